"""What is to be drawn, and everything of it that is refused before a bundle's engines open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from profiles.errors import SpecError
from runners.control_options import Control
from runners.control_tasks import control_task
from runners.lora_choices import LoraChoice
from runners.signature import Dim
from runners.weighting import weighted

if TYPE_CHECKING:
    from runners.manifest import Manifest

__all__ = [
    "Outpaint",
    "Request",
    "check_batch",
    "check_request",
    "check_size",
    "outpaint_of",
    "sides_of",
    "size_of",
]

Outpaint = tuple[int, int, int, int]
"""Pixels that a canvas is extended by: left, top, right, bottom."""


@dataclass(frozen=True)
class Request:
    """What to draw; None is what the bundle's model recommends, else the pipeline's own default."""

    prompt: str
    negative_prompt: str = ""
    steps: int | None = None
    guidance: float | None = None
    seed: int = -1
    """-1 draws one; picture i of a request uses seed + i."""
    count: int = 1
    batch: int = 1
    """Pictures at once."""
    width: int | None = None
    height: int | None = None
    scheduler: str | None = None
    image: Path | None = None
    """The picture to start from."""
    mask: Path | None = None
    """White where `image` is repainted."""
    outpaint: Outpaint | None = None
    strength: float | None = None
    """How much of `image` is noise at first: 0 is none, 1 is all."""
    clip_skip: int | None = None
    """1 is the text encoder's last layer, 2 the one before: A1111's numbers."""
    loras: tuple[LoraChoice, ...] = ()
    """Drawn with these, and no others."""

    controls: tuple[Control, ...] = ()
    """Control images, each for a network of the bundle."""

    @property
    def task(self) -> str:
        """The task of runners.pipeline.TASKS, or with controls of CONTROL_TASKS, that draws it."""
        return control_task(self._plain_task) if self.controls else self._plain_task

    @property
    def _plain_task(self) -> str:
        if self.mask is not None or self.outpaint is not None:
            return "inpaint"
        return "text-to-image" if self.image is None else "img2img"


def check_request(request: Request) -> None:
    """Raise SpecError, naming the option and its legal values, for what no bundle can draw."""
    for name, value in (
        ("--steps", request.steps),
        ("--count", request.count),
        ("--batch", request.batch),
        ("--clip-skip", request.clip_skip),
    ):
        if value is not None and value < 1:
            raise SpecError(f"{name} {value} is not possible: use 1 or more.")
    if request.seed < -1:
        raise SpecError(f"--seed {request.seed} is not possible: use 0 or more, or -1 to draw one.")
    if request.seed + request.count > 2**63:
        raise SpecError(f"--seed {request.seed} is too large: use less than 2^63 - count.")
    if request.guidance is not None and not 0 <= request.guidance <= 1000:
        raise SpecError(f"--guidance {request.guidance} is not possible: use 0 to 1000.")
    if request.strength is not None and not 0 <= request.strength <= 1:
        raise SpecError(f"--strength {request.strength} is not possible: use 0 to 1.")
    _check_text("--prompt", request.prompt)
    _check_text("--negative", request.negative_prompt)
    _check_image_given(request)


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SpecError(
            f"{name} holds bytes that are no UTF-8 text at character {error.start + 1}: give it in "
            "UTF-8."
        ) from error
    weighted(text)


def _check_image_given(request: Request) -> None:
    if request.image is not None:
        return
    edits = {
        "--mask": request.mask,
        "--outpaint": request.outpaint,
        "--strength": request.strength,
    }
    for name, value in edits.items():
        if value is not None:
            raise SpecError(f"{name} changes a picture: give that with --image FILE.")


def size_of(text: str | None) -> tuple[int | None, int | None]:
    """Width and height of `--size`; SpecError for what is no size."""
    if text is None:
        return None, None
    parts = text.lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(_is_number(part) for part in parts):
        raise SpecError(f"--size {text} is not a size: write it as WIDTHxHEIGHT, such as 512x512.")
    return int(parts[0]), int(parts[-1])


def outpaint_of(text: str | None) -> Outpaint | None:
    """The four numbers of `--outpaint`; SpecError for anything else."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 4 or not all(_is_number(part) for part in parts):
        raise SpecError(
            f"--outpaint {text} is not four numbers of pixels: write it as left,top,right,bottom, "
            "such as 0,0,128,0."
        )
    left, top, right, bottom = (int(part) for part in parts)
    if not any((left, top, right, bottom)):
        raise SpecError(f"--outpaint {text} adds nothing: make one of the four more than 0.")
    return left, top, right, bottom


def _is_number(text: str) -> bool:
    """At most six digits, so that no size overflows anything."""
    return text.strip().isascii() and text.strip().isdecimal() and len(text.strip()) <= 6


def sides_of(manifest: Manifest) -> Dim:
    """The sides in pixels that the bundle's engines were compiled for."""
    low, high = manifest.recipe["size_min"], manifest.recipe["size_max"]
    return Dim(name="side", min=low, opt=low, max=high, multiple_of=manifest.size_step)


def check_size(manifest: Manifest, width: int, height: int) -> None:
    """Raise SpecError, with the nearest legal size, unless the engines were compiled for it."""
    side = sides_of(manifest)
    if side.legal(width) and side.legal(height):
        return
    raise SpecError(
        f"--size {width}x{height} is not among the sizes that the bundle was compiled for "
        f"(sides of {side.describe()}): use {side.nearest(width)}x{side.nearest(height)}."
    )


def check_batch(manifest: Manifest, batch: int) -> None:
    """Raise SpecError unless the engines were compiled for so many pictures at once."""
    most = manifest.recipe["batch"]
    if batch > most:
        raise SpecError(
            f"--batch {batch} is more than the {most} that the bundle was compiled for: use "
            f"--batch {most}, or compile with --batch {batch}."
        )
