"""The contestants of a comparison: the plain pipeline, and a bundle a level."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from benchmarks.baselines import require_library
from benchmarks.compare import Wish
from benchmarks.contestants import REFERENCE, Contestant, slug
from optimizer.families import family
from optimizer.quantize.policy import AUTO, policy_names
from optimizer.recipe import Recipe, checked
from optimizer.source import ModelSource
from profiles.errors import SpecError
from runners.bundle import DIGEST_NAME
from runners.console import Console
from runners.manifest import Manifest

__all__ = [
    "baseline_contestants",
    "bundle_contestant",
    "contestants",
    "level_recipes",
    "plain_contestant",
]


def level_recipes(wish: Wish) -> dict[str, Recipe]:
    """The recipe of each level asked for; SpecError for a level or backend that isn't known.

    A level is a value of --quant; with a colon comes the goal of auto (auto:0.2x, auto:30db) or the
    solver of another one (int4:hqq). The unquantized level is always among them: it is the noise
    floor that the others are judged by.
    """
    recipes = {level: _recipe(wish, level) for level in wish.levels}
    if any(recipe.quant == "none" for recipe in recipes.values()):
        return recipes
    return {"none": _recipe(wish, "none"), **recipes}


def _recipe(wish: Wish, level: str) -> Recipe:
    name, _, detail = level.partition(":")
    if name not in policy_names():
        raise SpecError(f"--levels names {name!r}; the levels are {', '.join(policy_names())}")
    fields: dict[str, object] = {
        "model": wish.model,
        "revision": wish.revision,
        "quant": name,
        "backend": wish.backend,
    }
    if detail:
        fields |= _goal(level, detail) if name == AUTO else {"solver": detail}
    return checked(fields)


def _goal(level: str, detail: str) -> dict[str, object]:
    decibels = detail.lower().removesuffix("db")
    if decibels == detail.lower():
        return {"budget": detail}
    try:
        return {"min_quality": float(decibels)}
    except ValueError as error:
        raise SpecError(f"--levels names {level!r}: write it as auto:0.2x or auto:30db") from error


def contestants(wish: Wish, source: ModelSource, console: Console) -> list[Contestant]:
    """Everybody, the reference first; bundles that aren't in OUT/bundles yet are compiled."""
    from optimizer.compile import compile_bundle

    entrants = [plain_contestant(source), *baseline_contestants(wish, source)]
    for level, recipe in level_recipes(wish).items():
        # `force`: the folder is ours, and what lies there may be of another model or version
        folder = wish.out / "bundles" / slug(level)
        result = compile_bundle(recipe, folder, console=console, force=True)
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


def baseline_contestants(wish: Wish, source: ModelSource) -> list[Contestant]:
    """The plain pipeline in other people's ways; MissingError for one whose library isn't here."""
    for name in wish.baselines:
        require_library(name)
    plain = plain_contestant(source)
    return [replace(plain, name=name, kind=name, backend=name) for name in wish.baselines]


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
        quant=denoiser.quant,
    )
