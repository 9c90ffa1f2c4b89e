"""The sample sheet: generated pictures with their captions printed below them."""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_ZOOM = 2
_TILE = 64 * _ZOOM
_MARGIN = 10
_LINE = 11
_LINES = 6
_COLUMNS = 8
_WRAP = 25


def sample_sheet(images: list[Image.Image], captions: list[str]) -> Image.Image:
    """Return the pictures twice their size, eight in a row, each above its caption."""
    rows = -(-len(images) // _COLUMNS)
    width, height = _TILE + _MARGIN, _TILE + _MARGIN + _LINE * _LINES
    sheet = Image.new("RGB", (_COLUMNS * width + _MARGIN, rows * height + _MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(9)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = _MARGIN + index % _COLUMNS * width
        top = _MARGIN + index // _COLUMNS * height
        sheet.paste(image.resize((_TILE, _TILE), Image.Resampling.BICUBIC), (left, top))
        for line, text in enumerate(textwrap.wrap(caption, _WRAP)[:_LINES]):
            pen.text((left, top + _TILE + 2 + line * _LINE), text, "black", font)
    return sheet


def write_sheet(path: Path, images: list[Image.Image], captions: list[str]) -> None:
    """Write the sheet as PNG in 256 colours, dithered."""
    sheet = sample_sheet(images, captions)
    sheet.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
