"""What a request means for a bundle: the size that is drawn, from which pictures, and what becomes
of what was drawn. One class a workflow; none of it needs torch, so bad input is found at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, final

from PIL import Image

from profiles.errors import SpecError
from runners.fitting import Fit, fit_around, fit_covering, fit_inside, fit_whole
from runners.images import MOST_PIXELS, Source, open_image, open_mask
from runners.manifest import Manifest
from runners.masking import extended, grown_to_cells, without_seam
from runners.requests import (
    Outpaint,
    Request,
    check_batch,
    check_request,
    check_size,
    sides_of,
)
from runners.signature import Dim

__all__ = ["Drawing", "drawing_of"]

Size = tuple[int, int]


class Drawing(ABC):
    """A request's size in pixels, the pictures that a pipeline gets for it, and its way back."""

    def __init__(self, size: Size, result: Size) -> None:
        """Take what is drawn, and what comes out of it."""
        self.size, self.result = size, result
        self.facts: dict[str, Any] = {}
        """For the metadata: what the picture was made from."""
        self.notes: list[str] = []
        """Sentences for the user: what was changed to make it fit."""

    @abstractmethod
    def arguments(self, count: int, *, cell: int) -> dict[str, Any]:
        """The pictures that a pipeline is called with, `count` of each; a latent's cell has `cell`
        pixels a side.
        """

    @property
    def control_size(self) -> Size:
        """Of the picture that a control image has to match, before it lies on the canvas."""
        return self.size

    def control_canvas(self, image: Image.Image) -> Image.Image:
        """A control image of that size, as it lies over what is drawn."""
        return image

    @abstractmethod
    def finished(self, drawn: Image.Image, *, cell: int) -> Image.Image:
        """The picture that is saved."""


def drawing_of(request: Request, manifest: Manifest) -> Drawing:
    """Read the request's files and fit them to the bundle's sizes.

    Raises SpecError for a wrong request, a wrong file and a size that no engine was compiled for.
    """
    check_request(request)
    check_batch(manifest, request.batch)
    asked = _asked_size(request, manifest)
    if request.image is None:
        native = sides_of(manifest).nearest(manifest.native_size)
        return _FromText(asked or (native, native))
    image = open_image(request.image)
    if request.mask is None and request.outpaint is None:
        return _FromImage(image, asked, sides_of(manifest))
    return _repainted(image, request, asked, sides_of(manifest))


def _asked_size(request: Request, manifest: Manifest) -> Size | None:
    if request.width is None:
        return None
    size = request.width, request.height or request.width
    check_size(manifest, *size)
    return size


@final
class _FromText(Drawing):
    def __init__(self, size: Size) -> None:
        super().__init__(size, size)

    def arguments(self, count: int, *, cell: int) -> dict[str, Any]:  # noqa: ARG002
        return {}

    def finished(self, drawn: Image.Image, *, cell: int) -> Image.Image:  # noqa: ARG002
        return drawn


@final
class _FromImage(Drawing):
    """The whole picture, at its own size where that is in the bundle's range."""

    def __init__(self, image: Source, asked: Size | None, side: Dim) -> None:
        whole = image.picture.size
        fit = fit_covering(whole, asked) if asked else fit_whole(whole, side)
        super().__init__(fit.canvas, fit.scaled)
        self._fit, self._whole = fit, whole
        self._canvas = fit.canvas_of(image.picture)
        self.facts = {**_named("image", image), "canvas": list(fit.canvas)}
        if fit.scaled != whole:
            self.notes.append(f"{image.name} ({_by(whole)}) is drawn at {_by(fit.scaled)}.")

    @property
    def control_size(self) -> Size:
        return self._whole

    def control_canvas(self, image: Image.Image) -> Image.Image:
        return self._fit.canvas_of(image)

    def arguments(self, count: int, *, cell: int) -> dict[str, Any]:  # noqa: ARG002
        return {"image": [self._canvas] * count}

    def finished(self, drawn: Image.Image, *, cell: int) -> Image.Image:  # noqa: ARG002
        return drawn.crop((0, 0, *self.result))


@final
class _Repainted(Drawing):
    """A part of a picture; all other pixels stay as they are."""

    def __init__(self, picture: Image.Image, mask: Image.Image, fit: Fit) -> None:
        super().__init__(fit.canvas, picture.size)
        self._picture, self._mask, self._fit = picture, mask, fit
        self._canvas = fit.canvas_of(picture)
        self._repaint = fit.canvas_of_mask(mask)

    @property
    def control_size(self) -> Size:
        return self._picture.size

    def control_canvas(self, image: Image.Image) -> Image.Image:
        return self._fit.canvas_of(image)

    def arguments(self, count: int, *, cell: int) -> dict[str, Any]:
        return {
            "image": [self._canvas] * count,
            "mask_image": [grown_to_cells(self._repaint, cell)] * count,
        }

    def finished(self, drawn: Image.Image, *, cell: int) -> Image.Image:
        repainted = grown_to_cells(self._repaint, cell)
        matched = without_seam(drawn, self._canvas, repainted)
        result, window = self._picture.copy(), self._fit.window
        result.paste(self._fit.window_of(matched), window[:2], self._mask.crop(window))
        return result


def _repainted(image: Source, request: Request, asked: Size | None, side: Dim) -> Drawing:
    picture, mask = image.picture, None
    facts, notes = _named("image", image), []
    if request.mask is not None:
        source = open_mask(request.mask)
        mask, note = _mask_for(image, source)
        facts |= _named("mask", source)
        notes += note
    if request.outpaint is not None:
        _check_outpaint(picture.size, request.outpaint)
        picture, mask = extended(picture, mask, request.outpaint)
        facts["outpaint"] = list(request.outpaint)
    assert mask is not None, "the task has a mask or an extension"
    box = mask.getbbox()
    assert box is not None, "a mask that repaints nothing is refused"
    fit = fit_inside(picture.size, asked) if asked else fit_around(picture.size, box, side)
    drawing = _Repainted(picture, mask, fit)
    drawing.facts = {**facts, "canvas": list(fit.canvas)}
    drawing.notes = notes + _window_note(image, fit)
    return drawing


def _mask_for(image: Source, mask: Source) -> tuple[Image.Image, list[str]]:
    """The mask at the picture's size, and whether it was scaled; SpecError for another shape."""
    wanted, found = image.picture.size, mask.picture.size
    if found == wanted:
        return mask.picture, []
    if abs(found[0] * wanted[1] / wanted[0] - found[1]) > 1:
        raise SpecError(
            f"--mask {mask.name} is {_by(found)} and --image {image.name} is {_by(wanted)}, of "
            "another shape: make the mask as large as the picture."
        )
    scaled = mask.picture.resize(wanted, Image.Resampling.NEAREST)
    if scaled.getbbox() is None:
        raise SpecError(
            f"--mask {mask.name} has no white left when it is scaled from {_by(found)} to "
            f"{_by(wanted)}: make it as large as the picture."
        )
    return scaled, [f"{mask.name} ({_by(found)}) is scaled to {image.name}'s {_by(wanted)}."]


def _check_outpaint(size: Size, by: Outpaint) -> None:
    width, height = size[0] + by[0] + by[2], size[1] + by[1] + by[3]
    if width * height > MOST_PIXELS:
        raise SpecError(
            f"--outpaint {','.join(map(str, by))} makes {width}x{height}, more than "
            f"{MOST_PIXELS / 1e6:.0f} million pixels: add less."
        )


def _window_note(image: Source, fit: Fit) -> list[str]:
    if fit.window_size == fit.scaled:
        return []
    return [
        f"{_by(fit.window_size)} pixels of {image.name} are drawn at {_by(fit.scaled)} and scaled "
        "back; only what is repainted changes."
    ]


def _named(kind: str, source: Source) -> dict[str, Any]:
    return {kind: source.name, f"{kind}_sha256": source.sha256}


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
