"""Reads what kiln makes: bundles, engines, and diffusers pipelines that run on them.

`runners.load("BUNDLE")` gives a diffusers pipeline; importing this package loads no heavy library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from runners.manifest import Manifest

__all__ = ["load"]


def load(
    bundle: str | Path,
    *,
    task: str = "text-to-image",
    threads: int | None = None,
    trust: str | Path | None = None,
    verify: Literal["changed", "always"] = "changed",
    variant: str | None = None,
    residency: Literal["keep", "sequential"] = "keep",
    controlnets: Sequence[str] | None = None,
) -> Any:
    """The diffusers pipeline of `task`, running on the engines of `bundle`.

    `bundle` is a folder, or the name of an installed one, of which the current version runs.
    `threads` is the number of CPU threads (default: the physical cores), `trust` a NAME.pub or a
    trust file (default: the user's own) that says whose bundles may run beside those compiled on
    this machine. `verify` "always" hashes large files though they haven't changed since they were
    last hashed. `variant` is a level of the denoiser where the bundle holds several (default: the
    best). `residency` "sequential" keeps one part open at a time: text encoders, denoiser, VAE.
    `controlnets` are those of the bundle's that a task with "control" has (default: all).
    The pipeline is the plain diffusers class; `pipe.kiln` is the loaded bundle.
    Raises UntrustedError where nobody trusted has signed the bundle, what `require_compatible`
    raises where it doesn't fit this machine, BundleError when a byte is wrong, SelfTestError where
    its self-test failed here, SpecError for a path that is no bundle, an unknown task or variant.
    """
    from runners.bundle import open_bundle
    from runners.compatibility import require_compatible
    from runners.installed import located
    from runners.selftest import facts_for, require_passed
    from runners.trust import load_trust

    def check(manifest: Manifest) -> object:
        level = manifest.denoiser(variant).quant
        return require_compatible(manifest, facts_for(manifest), level)

    opened = open_bundle(
        located(Path(bundle)),
        trust=load_trust(trust),
        check=check,
        always_hash=verify == "always",
        without=lambda manifest: manifest.unused_by(variant),
        hold=residency == "keep",
    )
    require_passed(opened, facts_for(opened.manifest))

    from runners.pipeline import load as load_pipeline  # torch and all: only for verified bytes

    return load_pipeline(
        opened,
        task=task,
        threads=threads,
        variant=variant,
        residency=residency,
        controlnets=controlnets,
    )
