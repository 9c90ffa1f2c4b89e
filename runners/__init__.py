"""Reads what kiln makes: bundles, engines, and diffusers pipelines that run on them.

`runners.load("BUNDLE")` gives a diffusers pipeline; importing this package loads no heavy library.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["load"]


def load(
    bundle: str | Path,
    *,
    task: str = "text-to-image",
    threads: int | None = None,
    trust: str | Path | None = None,
) -> Any:
    """The diffusers pipeline of `task`, running on `bundle`'s engines; see runners.pipeline."""
    from runners.pipeline import load as load_pipeline

    return load_pipeline(bundle, task=task, threads=threads, trust=trust)
