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
    """The diffusers pipeline of `task`, running on the engines of `bundle`.

    `bundle` is a folder, or the name of an installed one, of which the current version runs.
    `threads` is the number of CPU threads (default: the physical cores), `trust` a NAME.pub or a
    trust file (default: the user's own) that says whose bundles may run beside those compiled on
    this machine. The pipeline is the plain diffusers class; `pipe.kiln` is the loaded bundle.
    Raises UntrustedError where nobody trusted has signed the bundle, BundleError when a byte is
    wrong, SpecError for a path that is no bundle or an unknown task.
    """
    from runners.bundle import open_bundle
    from runners.installed import located
    from runners.trust import load_trust

    opened = open_bundle(located(Path(bundle)), trust=load_trust(trust))

    from runners.pipeline import load as load_pipeline  # torch and all: only for verified bytes

    return load_pipeline(opened, task=task, threads=threads)
