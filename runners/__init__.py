"""Reads what kiln makes: bundles, engines, and diffusers pipelines that run on them.

`runners.load("BUNDLE")` gives a diffusers pipeline; importing this package loads no heavy library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

__all__ = ["load"]


def load(
    bundle: str | Path,
    *,
    task: str = "text-to-image",
    threads: int | None = None,
    trust: str | Path | None = None,
    verify: Literal["changed", "always"] = "changed",
    controlnets: Sequence[str] | None = None,
) -> Any:
    """The diffusers pipeline of `task`, running on the engines of `bundle`.

    `bundle` is a folder, or the name of an installed one, of which the current version runs.
    `threads` is the number of CPU threads (default: the physical cores), `trust` a NAME.pub or a
    trust file (default: the user's own) that says whose bundles may run beside those compiled on
    this machine. `verify` "always" hashes large files though they haven't changed since they were
    last hashed. `controlnets` are those of the bundle's that a task with "control" has (default:
    all). The pipeline is the plain diffusers class; `pipe.kiln` is the loaded bundle.
    Raises UntrustedError where nobody trusted has signed the bundle, what `require_compatible`
    raises where it doesn't fit this machine, BundleError when a byte is wrong, SelfTestError where
    its self-test failed here, SpecError for a path that is no bundle or an unknown task.
    """
    from runners.bundle import open_bundle
    from runners.compatibility import require_compatible
    from runners.installed import located
    from runners.selftest import facts_for, require_passed
    from runners.trust import load_trust

    opened = open_bundle(
        located(Path(bundle)),
        trust=load_trust(trust),
        check=lambda manifest: require_compatible(manifest, facts_for(manifest)),
        always_hash=verify == "always",
    )
    require_passed(opened, facts_for(opened.manifest))

    from runners.pipeline import load as load_pipeline  # torch and all: only for verified bytes

    return load_pipeline(opened, task=task, threads=threads, controlnets=controlnets)
