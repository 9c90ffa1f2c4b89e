from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from profiles.errors import SpecError
from runners import images
from runners.images import open_image, open_mask

RED, WHITE = (255, 0, 0), (255, 255, 255)


def saved(image: Image.Image, path: Path, **how: object) -> Path:
    image.save(path, **how)  # type: ignore[arg-type]
    return path


def test_a_picture_is_named_by_its_files_digest(tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (3, 2), RED), tmp_path / "a.png")
    source = open_image(path)
    assert source.name == "a.png"
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (source.picture.mode, source.picture.size) == ("RGB", (3, 2))


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 255, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    picture = open_image(saved(image, tmp_path / "a.png")).picture
    assert [picture.getpixel((x, 0)) for x in range(3)] == [RED, WHITE, (127, 127, 127)]


def test_a_palettes_transparent_colour_is_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    picture = open_image(saved(image, tmp_path / "a.png", transparency=1)).picture
    assert [picture.getpixel((x, 0)) for x in range(2)] == [RED, WHITE]


@pytest.mark.parametrize(
    ("array", "suffix"),
    [
        (np.array([[0, 128 * 257, 65535]], np.uint16), "png"),
        (np.array([[0, 128 * 257, 65535]], np.int32), "tif"),
        (np.array([[0, 128 / 255, 1]], np.float32), "tif"),
        (np.array([[0, 128, 255]], np.float32), "tif"),
    ],
    ids=["16-bit", "32-bit", "float", "float-255"],
)
def test_deep_greys_are_scaled_and_not_cut_off(
    array: np.ndarray, suffix: str, tmp_path: Path
) -> None:
    picture = open_image(saved(Image.fromarray(array), tmp_path / f"a.{suffix}")).picture
    assert [picture.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (128,) * 3, WHITE]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    suffix = "tif" if mode in ("CMYK", "YCbCr") else "png"
    image = Image.new("RGB", (8, 8), WHITE).convert(mode)
    picture = open_image(saved(image, tmp_path / f"a.{suffix}")).picture
    assert (picture.mode, picture.getpixel((4, 4))) == ("RGB", WHITE)


def test_a_camera_that_was_turned_gives_an_upright_picture(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), WHITE)
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    picture = open_image(saved(image, tmp_path / "a.png", exif=exif)).picture
    assert picture.size == (2, 3)
    assert picture.getpixel((1, 0)) == RED


def test_a_mask_is_white_from_128_and_its_transparent_parts_are_kept(tmp_path: Path) -> None:
    grey = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    mask = open_mask(saved(grey, tmp_path / "a.png")).picture
    assert np.asarray(mask).tolist() == [[0, 0, 255, 255]]
    clear = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    clear.putpixel((0, 0), (255, 255, 255, 255))
    mask = open_mask(saved(clear, tmp_path / "b.png")).picture
    assert np.asarray(mask).tolist() == [[255, 0]]


def test_a_mask_without_white_is_refused(tmp_path: Path) -> None:
    path = saved(Image.new("L", (4, 4), 127), tmp_path / "a.png")
    with pytest.raises(SpecError, match="is dark everywhere, so nothing would be repainted"):
        open_mask(path)


def refused(path: Path) -> str:
    with pytest.raises(SpecError) as caught:
        open_image(path)
    return str(caught.value)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    assert "can't be read (No such file or directory)" in refused(tmp_path / "none.png")
    assert "is not a file" in refused(tmp_path)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    assert "is not a picture that can be read (of no known format)" in refused(text)
    text.write_bytes(b"")
    assert "(of no known format)" in refused(text)
    script = tmp_path / "a.eps"
    script.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "(of no known format)" in refused(script)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp", "gif"])
def test_half_a_picture_is_refused(suffix: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise), tmp_path / f"a.{suffix}")
    open_image(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    assert "is not a picture that can be read (" in refused(path)


def test_a_huge_picture_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(Image.new("1", (20_000, 10_000)), tmp_path / "a.png")
    assert "more than 89 million pixels: scale it down" in refused(path)
    path = saved(Image.new("1", (10_000, 9_000)), tmp_path / "a.png")
    assert "more than 89 million pixels: scale it down" in refused(path)
    monkeypatch.setattr(images, "_MOST_BYTES", 10)
    assert "is larger than 1 GiB" in refused(path)
