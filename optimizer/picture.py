"""The picture that a bundle's self-test compares with: drawn once, by the bundle that was made."""

from __future__ import annotations

from pathlib import Path

from runners.bundle import Bundle, read_manifest
from runners.manifest import Picture
from runners.reference_picture import draw

__all__ = ["draw_picture"]


def draw_picture(folder: Path, wanted: Picture, out: Path) -> None:
    """Draw what `wanted` says with the bundle in `folder`, its bytes verified, into `out`."""
    bundle = Bundle(folder, read_manifest(folder))
    picture = draw(
        bundle, prompt=wanted.prompt, seed=wanted.seed, steps=wanted.steps, side=wanted.side
    )
    picture.save(out / wanted.file, optimize=True)
