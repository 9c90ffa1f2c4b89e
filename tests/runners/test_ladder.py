"""What happens when memory runs out: the next smaller way, named; what was finished stays."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from profiles.errors import OutOfMemory
from runners.engines import onnxruntime
from runners.metadata import read_metadata

MakeBundle = Callable[..., Path]
Kiln = Callable[..., Any]
Limit = Callable[[Callable[[Any, dict[str, Any]], bool]], None]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch, bundle: MakeBundle) -> Limit:
    """`limit(too_large)`: engines get no memory for what `too_large(engine, feeds)` says.

    Bundles are made before, by engines that do.
    """
    for levels in ("none", "none,int8w"):
        bundle("onnxruntime", levels)
    run = onnxruntime.OnnxRuntimeEngine._run

    def limited(too_large: Callable[[Any, dict[str, Any]], bool]) -> None:
        def patched(self: Any, feeds: dict[str, Any]) -> dict[str, Any]:
            if too_large(self, feeds):
                raise RuntimeError("Failed to allocate memory for requested buffer of size 1")
            return run(self, feeds)

        monkeypatch.setattr(onnxruntime.OnnxRuntimeEngine, "_run", patched)

    return limited


@pytest.fixture
def draw(kiln: Kiln, bundle: MakeBundle) -> Kiln:
    def run(*arguments: object, levels: str = "none") -> Any:
        folder = bundle("onnxruntime", levels)
        options = ("--prompt", "a red circle", "--steps", "1", "--threads", "1", "--seed", "3")
        return kiln("generate", folder, *options, *arguments)

    return run


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def _batch(feeds: dict[str, Any]) -> int:
    return len(feeds["sample"]) if "sample" in feeds else 0


def test_fewer_pictures_at_once_come_first(draw: Kiln, limit: Limit, tmp_path: Path) -> None:
    assert draw("--count", "2", "--batch", "2", "-o", tmp_path / "whole.png").code == 0
    limit(lambda _, feeds: _batch(feeds) > 2)  # two prompts each
    ended = draw("--count", "2", "--batch", "2", "-o", tmp_path / "a.png")
    assert ended.code == 0, ended.err
    assert (
        "Warning: memory ran out (none, all parts kept, 2 pictures at once); goes on with none, "
        "all parts kept."
    ) in ended.err
    for number in ("0001", "0002"):
        facts = read_metadata(tmp_path / f"a-{number}.png")
        assert facts["way"] == {
            "variant": "none",
            "residency": "keep",
            "tiled": False,
            "batch": 1,
        }
    assert read_metadata(tmp_path / "whole-0001.png")["way"]["batch"] == 2


def test_tiles_come_last_for_they_change_the_picture(
    draw: Kiln, limit: Limit, tmp_path: Path
) -> None:
    limit(lambda _, feeds: feeds["latent"].shape[-1] > 16 if "latent" in feeds else False)
    ended = draw("--size", "96x64", "-o", tmp_path / "a.png")
    assert ended.code == 0, ended.err
    warnings = [line for line in ended.err.splitlines() if "memory ran out" in line]
    assert warnings[0].endswith("goes on with none, one part at a time.")
    assert warnings[-1].endswith("VAE in tiles.")
    assert read_metadata(tmp_path / "a.png")["way"]["tiled"] is True


def test_then_one_part_at_a_time(draw: Kiln, limit: Limit, tmp_path: Path) -> None:
    """The decoder gets no memory as long as the denoiser is open."""
    assert draw("-o", tmp_path / "whole.png").code == 0

    def too_large(_: Any, feeds: dict[str, Any]) -> bool:
        alive = [o for o in gc.get_objects() if isinstance(o, onnxruntime.OnnxRuntimeEngine)]
        return "latent" in feeds and sum(one._opened for one in alive) > 1

    limit(too_large)
    ended = draw("-o", tmp_path / "a.png")
    assert ended.code == 0, ended.err
    assert "goes on with none, one part at a time." in ended.err
    assert read_metadata(tmp_path / "a.png")["way"]["residency"] == "sequential"
    assert pixels(tmp_path / "a.png") == pixels(tmp_path / "whole.png")


def _best(engine: Any, feeds: dict[str, Any]) -> bool:
    """The unquantized denoiser is too large."""
    return "sample" in feeds and len(engine.files["weights"]) > 8_000_000


def test_a_smaller_variant_only_where_that_is_allowed(
    draw: Kiln, limit: Limit, tmp_path: Path
) -> None:
    limit(_best)
    refused = draw("-o", tmp_path / "a.png", levels="none,int8w")
    assert refused.code == OutOfMemory.exit_code
    assert "no smaller way that may be taken" in refused.sentence
    assert "--allow-variant-fallback" in refused.sentence
    assert not (tmp_path / "a.png").exists()
    ended = draw("--allow-variant-fallback", "-o", tmp_path / "a.png", levels="none,int8w")
    assert ended.code == 0, ended.err
    assert "goes on with int8w, one part at a time." in ended.err
    assert read_metadata(tmp_path / "a.png")["way"]["variant"] == "int8w"


def test_what_was_finished_stays(draw: Kiln, limit: Limit, tmp_path: Path) -> None:
    calls = 0

    def second(_: Any, feeds: dict[str, Any]) -> bool:
        nonlocal calls
        calls += "latent" in feeds
        return calls > 1

    limit(second)
    ended = draw("--count", "2", "-o", tmp_path / "a.png")
    assert ended.code == OutOfMemory.exit_code
    assert [path.name for path in tmp_path.iterdir()] == ["a-0001.png"]


def test_other_errors_are_not_taken_for_memory(
    bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    import runners
    from runners.requests import Request
    from runners.workflows import pictures

    def broken(*_: Any) -> dict[str, Any]:
        raise RuntimeError("another failure")

    monkeypatch.setattr(onnxruntime.OnnxRuntimeEngine, "_run", broken)
    pipeline = runners.load(bundle("onnxruntime"), threads=1)
    with pytest.raises(RuntimeError, match="another failure"):
        list(pictures(pipeline, Request(prompt="a", steps=1)))


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (("--variant", "fp8"), 2, "--variant fp8 is not in the bundle: use none, or compile"),
        (("--tiled",), 2, "--tiled is for pictures larger than a tile (64 px), and 64x64 is not"),
        (("--memory", "much"), 2, "--memory much is no size: write it as 8GiB"),
        (("--memory", "1MiB"), 13, "No way to draw this fits into 0.00 GiB: the smallest (none, "),
        (
            ("--variant", "none", "--allow-variant-fallback"),
            2,
            "--variant none and --allow-variant-fallback contradict each other",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(
    draw: Kiln, tmp_path: Path, options: tuple[str, ...], code: int, sentence: str
) -> None:
    ended = draw(*options, "-o", tmp_path / "a.png")
    assert ended.code == code
    assert sentence in ended.sentence
    assert not (tmp_path / "a.png").exists()


def test_the_best_that_fits_is_named(draw: Kiln, tmp_path: Path) -> None:
    ended = draw("--memory", "100GiB", "-o", tmp_path / "a.png", levels="none,int8w")
    assert ended.code == 0, ended.err
    assert "Draws with none, all parts kept: the best that fits, " in ended.err
    assert "of the 100.00 GiB that --memory allows." in ended.err
