"""The contestants of a comparison: the plain pipeline, and a bundle a level."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.compare import Wish
from benchmarks.contestants import REFERENCE, Contestant
from optimizer.families import family
from optimizer.quantize.policy import policy_names
from optimizer.recipe import Recipe, checked
from optimizer.source import ModelSource
from profiles.errors import SpecError
from runners.bundle import DIGEST_NAME
from runners.console import Console
from runners.manifest import Manifest

__all__ = ["bundle_contestant", "contestants", "level_recipes", "plain_contestant"]


def level_recipes(wish: Wish) -> dict[str, Recipe]:
    """The recipe of each level asked for; SpecError for a level or backend that isn't known."""
    known = policy_names()
    unknown = [level for level in wish.levels if level not in known]
    if unknown:
        raise SpecError(f"--levels names {unknown[0]!r}; the levels are {', '.join(known)}")
    return {
        level: checked(
            {
                "model": wish.model,
                "revision": wish.revision,
                "quant": level,
                "backend": wish.backend,
            }
        )
        for level in wish.levels
    }


def contestants(wish: Wish, source: ModelSource, console: Console) -> list[Contestant]:
    """Everybody, the reference first; bundles that aren't in OUT/bundles yet are compiled."""
    from optimizer.compile import compile_bundle

    entrants = [plain_contestant(source)]
    for level, recipe in level_recipes(wish).items():
        # `force`: the folder is ours, and what lies there may be of another model or version
        result = compile_bundle(recipe, wish.out / "bundles" / level, console=console, force=True)
        entrants.append(bundle_contestant(level, result.bundle, result.manifest))
    return entrants


def plain_contestant(source: ModelSource) -> Contestant:
    """The diffusers pipeline of the model's folder, sized as it lies on the disk."""
    known = family(source.family)
    folder = next(spec.folder for spec in known.components if spec.role == "denoiser")
    shapes = (parameter.shape for parameter in source.parameters(folder).values())
    return Contestant(
        REFERENCE,
        "diffusers",
        source.folder,
        backend="diffusers",
        dtype="fp32",
        bytes=sum(file.size for file in source.files.values()),
        denoiser_bytes=sum(path.stat().st_size for path in source.weight_files(folder)),
        denoiser_fp32_bytes=4 * sum(math.prod(shape) for shape in shapes),
    )


def bundle_contestant(level: str, bundle: Path, manifest: Manifest) -> Contestant:
    """A compiled bundle; its digest is its manifest's, which has those of all other files."""
    denoiser = manifest.component("denoiser")
    return Contestant(
        level,
        "bundle",
        bundle,
        backend=denoiser.backend,
        dtype=denoiser.dtype,
        bytes=sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()),
        denoiser_bytes=denoiser.engine_bytes,
        denoiser_fp32_bytes=denoiser.fp32_bytes,
        digest=(bundle / DIGEST_NAME).read_text("ascii").split(" ")[0],
    )
