"""Pictures and masks that people bring: any mode, upright, of a sane size, and named by digest."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from profiles.errors import SpecError

__all__ = ["MOST_PIXELS", "Source", "open_image", "open_mask"]

MOST_PIXELS = 89_478_485
"""Pillow's own limit (a quarter of a GiB of RGB), beyond which it speaks of decompression bombs."""

_MOST_BYTES = 1 << 30
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
"""What Pillow decodes by itself: never EPS, for which it starts another program."""

_MASKED_FROM = 128
"""The grey value from which a mask's pixel is repainted."""


@dataclass(frozen=True)
class Source:
    """A picture that was read from a file."""

    name: str
    """The file's name without its folder."""
    sha256: str
    """Of the file's bytes."""
    picture: Image.Image


def open_image(path: Path, option: str = "--image") -> Source:
    """The picture at `path` in RGB, turned upright, transparent parts on white.

    Of an animation it is the first frame. Raises SpecError for what is no picture.
    """
    return _source(path, option, lambda image: _flattened(image, "white"))


def open_mask(path: Path, option: str = "--mask") -> Source:
    """The mask at `path`, of any mode, in 0 (kept) and 255 (repainted); transparent parts are kept.

    Raises SpecError for what is no picture, and where nothing would be repainted.
    """
    source = _source(path, option, _as_mask)
    if source.picture.getbbox() is None:
        raise SpecError(
            f"{option} {path} is dark everywhere, so nothing would be repainted: paint white what "
            "should be."
        )
    return source


def _as_mask(image: Image.Image) -> Image.Image:
    grey = _flattened(image, "black").convert("L")
    return grey.point([255 if value >= _MASKED_FROM else 0 for value in range(256)])


def _source(path: Path, option: str, convert: Callable[[Image.Image], Image.Image]) -> Source:
    raw = _read(path, option)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(raw), formats=_FORMATS) as image:
                picture = convert(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise SpecError(
            f"{option} {path} has more than {MOST_PIXELS / 1e6:.0f} million pixels: scale it down."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise a dozen kinds
        raise SpecError(
            f"{option} {path} is not a picture that can be read ({_reason(error)}): give a whole "
            "PNG, JPEG, WebP, TIFF, BMP or GIF file."
        ) from error
    return Source(path.name, hashlib.sha256(raw).hexdigest(), picture)


def _read(path: Path, option: str) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise SpecError(f"{option} {path} is not a file: give a picture.")
        if path.stat().st_size > _MOST_BYTES:
            raise SpecError(f"{option} {path} is larger than 1 GiB: scale the picture down.")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecError(
            f"{option} {path} can't be read ({reason}): give a picture that is there."
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "of no known format"
    return str(error).rstrip(".").replace("\n", " ") or type(error).__name__


def _flattened(image: Image.Image, ground: str) -> Image.Image:
    """Upright, in 8-bit RGB, on a ground of one colour."""
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        return _from_deep(upright).convert("RGB")
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = upright.convert("RGBA")
    whole = Image.new("RGBA", layer.size, ground)
    whole.alpha_composite(layer)
    return whole.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or floats, in 8 bits: convert("L") would cut it off at 255.

    Floats are taken as 0..1 unless one is larger, integers as 16-bit.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    full = 65535.0
    if image.mode == "F":
        full = 1.0 if values.max(initial=0) <= 1 else 255.0
    return Image.fromarray(np.round(values / full * 255).clip(0, 255).astype(np.uint8))
