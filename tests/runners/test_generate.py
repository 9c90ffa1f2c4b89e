"""`kiln generate`: pictures, names, metadata, and what it says of a wrong request."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runners.bundle import digest_line
from runners.mark import mark_bundle
from runners.metadata import parameters_text, read_metadata

MakeBundle = Callable[..., Path]
Kiln = Callable[..., Any]
FAST = ("--steps", "2", "--threads", "1")


@pytest.fixture
def draw(kiln: Kiln, bundle: MakeBundle) -> Kiln:
    def run(*arguments: object, prompt: str = "a red circle") -> Any:
        return kiln("generate", bundle("openvino"), "--prompt", prompt, *FAST, *arguments)

    return run


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_a_picture_says_how_to_make_it_again(
    draw: Kiln, kiln: Kiln, bundle: MakeBundle, tmp_path: Path
) -> None:
    first, second = tmp_path / "a.png", tmp_path / "new" / "b.png"
    options = ("--negative", "blue", "--guidance", "3.5", "--scheduler", "euler_a")
    ended = draw(*options, "--size", "96x64", "--seed", "7", "--json", "-o", first)
    assert ended.code == 0, ended.err
    [line] = ended.out.splitlines()
    document = json.loads(line)
    assert document["images"] == [{"file": str(first), "seed": 7}]
    facts = read_metadata(first)
    manifest = json.loads(kiln("inspect", bundle("openvino"), "--json").out)
    assert facts == {
        "prompt": "a red circle",
        "negative_prompt": "blue",
        "steps": 2,
        "guidance": 3.5,
        "seed": 7,
        "width": 96,
        "height": 64,
        "scheduler": "EulerAncestralDiscreteScheduler",
        "model": "tiny",
        "model_digest": manifest["model"]["digest"],
        "bundle": manifest["key"],
        "kiln": manifest["kiln"],
        "way": {"variant": "none", "residency": "keep", "tiled": False, "batch": 1},
    }
    with Image.open(first) as image:
        assert image.size == (96, 64)
        assert image.info["parameters"] == parameters_text(facts)
    again = draw(*options, "--size", "96x64", "--seed", facts["seed"], "-o", second)
    assert again.code == 0
    assert str(second) in again.out
    assert pixels(second) == pixels(first)


def test_pictures_of_a_count_are_numbered_and_one_seed_apart(draw: Kiln, tmp_path: Path) -> None:
    ended = draw("--count", "3", "--batch", "2", "--seed", "5", "--json", "-o", tmp_path / "x.png")
    assert ended.code == 0, ended.err
    names = [f"x-{i:04}.png" for i in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [read_metadata(tmp_path / name)["seed"] for name in names] == [5, 6, 7]
    images = json.loads(ended.out)["images"]
    assert images == [
        {"file": str(tmp_path / name), "seed": seed}
        for name, seed in zip(names, (5, 6, 7), strict=True)
    ]
    assert len({pixels(tmp_path / name) for name in names}) == 3


def test_what_is_omitted_is_drawn_or_the_models_own(draw: Kiln, tmp_path: Path) -> None:
    assert draw("-o", tmp_path / "a.png").code == 0
    facts = read_metadata(tmp_path / "a.png")
    assert 0 <= facts["seed"] < 2**32
    assert (facts["width"], facts["height"]) == (64, 64)
    assert facts["scheduler"] == "DDIMScheduler"
    assert facts["guidance"] == 7.5


def test_where_the_native_size_was_not_compiled_the_nearest_is_drawn(
    kiln: Kiln, bundle: MakeBundle, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle("openvino"), tmp_path / "bundle"))
    document = json.loads((copy / "manifest.json").read_bytes())
    raw = json.dumps({**document, "native_size": 1001}).encode()
    (copy / "manifest.json").write_bytes(raw)
    (copy / "manifest.sha256").write_bytes(digest_line(raw))
    mark_bundle(copy)
    out = tmp_path / "a.png"
    assert kiln("generate", copy, "--prompt", "a red circle", *FAST, "-o", out).code == 0
    assert read_metadata(out)["width"] == 128


def test_an_edited_picture_says_how_to_make_it_again(
    draw: Kiln, kiln: Kiln, bundle: MakeBundle, tmp_path: Path
) -> None:
    start, mask = tmp_path / "start.png", tmp_path / "mask.png"
    Image.effect_mandelbrot((40, 50), (-2, -1, 1, 1), 50).convert("RGB").save(start)
    Image.new("L", (80, 100), 255).save(mask)
    options = ("--image", start, "--mask", mask, "--outpaint", "8,0,0,6", "--strength", "0.9")
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    ended = draw(*options, "--clip-skip", "2", "--seed", "7", "--json", "-o", first)
    assert ended.code == 0, ended.err
    assert "mask.png (80x100) is scaled to start.png's 40x50." in ended.err
    facts = read_metadata(first)
    manifest = json.loads(kiln("inspect", bundle("openvino"), "--json").out)
    assert facts == {
        "prompt": "a red circle",
        "negative_prompt": "",
        "steps": 2,
        "guidance": 7.5,
        "seed": 7,
        "width": 48,
        "height": 56,
        "scheduler": "DDIMScheduler",
        "strength": 0.9,
        "clip_skip": 2,
        "image": "start.png",
        "image_sha256": hashlib.sha256(start.read_bytes()).hexdigest(),
        "mask": "mask.png",
        "mask_sha256": hashlib.sha256(mask.read_bytes()).hexdigest(),
        "outpaint": [8, 0, 0, 6],
        "canvas": [48, 56],
        "model": "tiny",
        "model_digest": manifest["model"]["digest"],
        "bundle": manifest["key"],
        "kiln": manifest["kiln"],
        "way": {"variant": "none", "residency": "keep", "tiled": False, "batch": 1},
    }
    document = json.loads(ended.out)
    assert document["images"] == [{"file": str(first), "seed": 7}]
    assert {**document, "seed": 7}.items() >= facts.items()
    with Image.open(first) as image:
        assert image.size == (48, 56)
        assert "Denoising strength: 0.9, Clip skip: 2" in image.info["parameters"]
    again = draw(*options, "--clip-skip", "2", "--seed", facts["seed"], "-o", second)
    assert again.code == 0
    assert pixels(second) == pixels(first)


def test_a_prompt_that_is_cut_is_said_and_recorded(draw: Kiln, tmp_path: Path) -> None:
    ended = draw("-o", tmp_path / "a.png", prompt="a" * 90 + " over")
    assert ended.code == 0
    assert 'Warning: the prompt is longer than the 90 tokens that the bundle takes; "over"' in (
        ended.err
    )
    assert read_metadata(tmp_path / "a.png")["prompt_dropped"] == "over"


WRONG: dict[str, tuple[tuple[object, ...], str]] = {
    "steps": (("--steps", "-3"), "--steps -3 is not possible: use 1 or more."),
    "no-steps": (("--steps", "0"), "--steps 0 is not possible: use 1 or more."),
    "count": (("--count", "0"), "--count 0 is not possible: use 1 or more."),
    "batch": (("--batch", "0"), "--batch 0 is not possible: use 1 or more."),
    "large-batch": (
        ("--batch", "3"),
        "--batch 3 is more than the 2 that the bundle was compiled for: use --batch 2, or compile "
        "with --batch 3.",
    ),
    "seed": (("--seed", "-2"), "--seed -2 is not possible: use 0 or more, or -1 to draw one."),
    "large-seed": (
        ("--seed", str(2**63)),
        f"--seed {2**63} is too large: use less than 2^63 - count.",
    ),
    "guidance": (("--guidance", "-1"), "--guidance -1.0 is not possible: use 0 to 1000."),
    "nan-guidance": (("--guidance", "nan"), "--guidance nan is not possible: use 0 to 1000."),
    "size": (
        ("--size", "60x60"),
        "--size 60x60 is not among the sizes that the bundle was compiled for (sides of 32 to 128 "
        "in steps of 8): use 64x64.",
    ),
    "large-size": (("--size", "512"), "in steps of 8): use 128x128."),
    "zero-size": (("--size", "0x64"), "in steps of 8): use 32x64."),
    "no-size": (
        ("--size", "large"),
        "--size large is not a size: write it as WIDTHxHEIGHT, such as 512x512.",
    ),
    "scheduler": (
        ("--scheduler", "dpm"),
        "--scheduler dpm is not known: use one of ddim, ddim_trailing, ddpm, ",
    ),
    "threads": (("--threads", "0"), "--threads 0 is not possible: use 1 or more."),
    "negative-threads": (("--threads", "-1"), "--threads -1 is not possible: use 1 or more."),
    "clip-skip": (("--clip-skip", "0"), "--clip-skip 0 is not possible: use 1 or more."),
    "deep-clip-skip": (("--clip-skip", "9"), "the text encoder's 2 layers: use 1 to 2."),
    "strength": (("--strength", "1.5"), "--strength 1.5 is not possible: use 0 to 1."),
    "nan-strength": (("--strength", "nan"), "--strength nan is not possible: use 0 to 1."),
    "lone-strength": (
        ("--strength", "0.5"),
        "--strength changes a picture: give that with --image FILE.",
    ),
    "lone-mask": (("--mask", "m.png"), "--mask changes a picture: give that with --image FILE."),
    "lone-outpaint": (
        ("--outpaint", "1,1,1,1"),
        "--outpaint changes a picture: give that with --image FILE.",
    ),
    "weight": (("--negative", "(a:99)"), 'The prompt gives "a" the weight 99: use -10 to 10.'),
    "bytes": (("--negative", "a\udcff"), "--negative holds bytes that are no UTF-8 text at "),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_ends_with_2_and_says_what_is_possible(
    draw: Kiln, tmp_path: Path, case: str
) -> None:
    arguments, sentence = WRONG[case]
    ended = draw(*arguments, "-o", tmp_path / "a.png")
    assert ended.code == 2
    assert sentence in ended.sentence
    assert ended.sentence.startswith("Error: ")
    assert ended.out == ""
    assert list(tmp_path.iterdir()) == []


IMAGE_WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "absent": (("--image", "none.png"), "none.png can't be read (No such file or directory)"),
    "folder": (("--image", "."), "is not a file: give a picture."),
    "text": (("--image", "text.png"), "is not a picture that can be read (of no known format)"),
    "bomb": (("--image", "bomb.png"), "bomb.png has more than 89 million pixels: scale it down."),
    "other-shape": (
        ("--mask", "wide.png"),
        "--mask wide.png is 80x40 and --image start.png is 40x50, of another shape: make the mask "
        "as large as the picture.",
    ),
    "dark": (
        ("--mask", "start.png"),
        "start.png is dark everywhere, so nothing would be repainted",
    ),
    "no-mask": (("--mask", "text.png"), "text.png is not a picture that can be read"),
    "three-sides": (
        ("--outpaint", "1,2,3"),
        "--outpaint 1,2,3 is not four numbers of pixels: write it as left,top,right,bottom, such "
        "as 0,0,128,0.",
    ),
    "inwards": (("--outpaint", "1,2,3,-4"), "--outpaint 1,2,3,-4 is not four numbers of pixels"),
    "halves": (("--outpaint", "1,2,3,4.5"), "--outpaint 1,2,3,4.5 is not four numbers of pixels"),
    "nothing": (("--outpaint", "0,0,0,0"), "--outpaint 0,0,0,0 adds nothing: make one of the four"),
    "endless": (
        ("--outpaint", "0,0,999999,999999"),
        "makes 1000039x1000049, more than 89 million pixels: add less.",
    ),
    "size": (("--size", "60x60"), "in steps of 8): use 64x64."),
    "no-step": (("--strength", "0.4"), "--strength 0.4 of 2 steps runs none, so nothing would"),
}


@pytest.mark.parametrize("case", IMAGE_WRONG)
def test_a_wrong_edit_ends_with_2_and_says_what_is_possible(
    draw: Kiln, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 50)).save("start.png")
    Image.new("L", (80, 40), 255).save("wide.png")
    Image.new("1", (20_000, 10_000)).save("bomb.png")
    Path("text.png").write_text("no picture")
    arguments, sentence = IMAGE_WRONG[case]
    ended = draw("--image", "start.png", *arguments, "-o", "a.png")
    assert ended.code == 2
    assert sentence in ended.sentence
    assert ended.sentence.startswith("Error: ")
    assert ended.out == ""
    assert not Path("a.png").exists()
    assert ("Load" in ended.err) == (case == "no-step"), "files are read before the bundle is"


def test_a_file_that_cannot_be_written_is_found_before_any_work(draw: Kiln, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    for out, sentence in (
        ("a.jpg", "should end in .png, the only format that is written."),
        (
            "folder.png",
            f"is a folder: give a file name in it, such as {tmp_path / 'folder.png' / 'a.png'}.",
        ),
        ("file/a.png", "give a folder that you can write."),
    ):
        ended = draw("-o", tmp_path / out)
        assert ended.code == 2
        assert sentence in ended.sentence
        assert "Load" not in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_what_is_no_bundle_ends_with_2(kiln: Kiln, tmp_path: Path) -> None:
    ended = kiln("generate", tmp_path / "none", "--prompt", "x", "-o", tmp_path / "a.png")
    assert ended.code == 2
    assert "is not a bundle" in ended.sentence
    assert "kiln compile MODEL -o" in ended.sentence


def test_a_missing_option_is_clicks_own_error(kiln: Kiln, bundle: MakeBundle) -> None:
    ended = kiln("generate", bundle("openvino"), "-o", "a.png")
    assert ended.code == 2
    assert "Missing option '--prompt'" in ended.err


def test_pictures_that_are_finished_stay_when_a_later_one_fails(
    draw: Kiln, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runners import metadata

    save = metadata.save_picture

    def interrupted(image: Image.Image, path: Path, facts: dict[str, Any]) -> None:
        if path.name == "x-0002.png":
            raise KeyboardInterrupt
        save(image, path, facts)

    monkeypatch.setattr(metadata, "save_picture", interrupted)
    ended = draw("--count", "3", "-o", tmp_path / "x.png")
    assert ended.code == 130
    assert ended.sentence == "Error: Interrupted; what was finished is kept."
    assert [path.name for path in tmp_path.iterdir()] == ["x-0001.png"]


def test_a_full_disk_ends_with_14(
    draw: Kiln, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from runners import metadata

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x.png")

    monkeypatch.setattr(metadata, "save_picture", full)
    ended = draw("-o", tmp_path / "x.png")
    assert ended.code == 14
    assert ended.sentence == "Error: No space left for x.png: free some and run again."
