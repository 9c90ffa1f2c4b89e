"""The picture that a bundle's self-test compares with: drawn once, by the bundle that was made."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from optimizer.memory_entries import PEAK_NAME
from runners import gauge
from runners.bundle import Bundle, read_manifest
from runners.manifest import Picture
from runners.memory import Residency
from runners.reference_picture import draw
from runners.trust import load_trust

__all__ = ["draw_picture"]

_AS_GENERATE = ("runners.generate", "runners.metadata", "runners.prompting", "runners.workflows")
"""What `kiln generate` imports beside, so that this process is as large as one of it."""


def draw_picture(folder: Path, wanted: Picture, residency: Residency, out: Path) -> None:
    """Draw what `wanted` says with the bundle in `folder`, its bytes verified, into `out`.

    `PEAK_NAME` says what that took: the bundle's memory is calibrated with it.
    """
    for name in _AS_GENERATE:
        import_module(name)
    load_trust(None)
    bundle = Bundle(folder, read_manifest(folder))
    bundle.verify()
    picture = draw(
        bundle,
        prompt=wanted.prompt,
        seed=wanted.seed,
        steps=wanted.steps,
        side=wanted.side,
        residency=residency,
    )
    picture.save(out / wanted.file, optimize=True)
    (out / PEAK_NAME).write_text(json.dumps({"peak_rss_bytes": gauge.peak_bytes()}), "utf-8")
