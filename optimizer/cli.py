"""`kiln compile`: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from profiles.errors import SpecError
from runners.console import Console, quiet_libraries

if TYPE_CHECKING:
    from optimizer.compile import CompileResult
    from optimizer.plan import Plan
    from optimizer.recipe import Recipe
    from runners.manifest import Manifest

__all__ = ["compile_command", "summary"]


@click.command("compile")
@click.argument("model", required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The bundle's folder.")
@click.option("--revision", help="Commit, tag or branch of a hub model.")
@click.option("--quant", help="none, int8 or int4 [default: the profile's]")
@click.option("--dtype", help="auto, fp32, bf16 or fp16: of what isn't quantized [default: auto]")
@click.option("--backend", help="openvino, onnxruntime or eager [default: the profile's]")
@click.option("--profile", help="Kind of machine to build for [default: this one's]")
@click.option("--size-range", metavar="MIN:MAX", help="Sides in pixels that must work.")
@click.option("--size", metavar="WxH", help="The one size that must work, such as 512x512.")
@click.option("--batch", type=int, help="Pictures at once that must work [default: 4]")
@click.option("--steps", type=int, help="Of calibration and measurement.")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="A recipe's file.")
@click.option("--force", is_flag=True, help="Replace another bundle at -o.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
@click.option("-v", "--verbose", is_flag=True, help="Show what the tools print.")
def compile_command(  # noqa: PLR0913 (one parameter an option)
    model: str | None,
    out: Path | None,
    size_range: str | None,
    size: str | None,
    recipe_file: Path | None,
    force: bool,  # noqa: FBT001
    dry_run: bool,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
    verbose: bool,  # noqa: FBT001
    revision: str | None,
    quant: str | None,
    dtype: str | None,
    backend: str | None,
    profile: str | None,
    batch: int | None,
    steps: int | None,
) -> None:
    """Make a bundle from MODEL: a diffusers folder, a hub id, or a .safetensors checkpoint."""
    quiet_libraries()
    from optimizer.compile import compile_bundle, plan_recipe

    console = Console(json_output=as_json, verbose=verbose)
    given = {
        "model": model,
        "revision": revision,
        "quant": quant,
        "dtype": dtype,
        "backend": backend,
        "profile": profile,
        "batch": batch,
        "steps": steps,
        **_sizes(size_range, size),
    }
    recipe = _recipe({k: v for k, v in given.items() if v is not None}, recipe_file)
    if dry_run:
        plan, _ = plan_recipe(recipe)
        console.result(_plan_text(plan), _plan_document(plan))
        return
    if out is None:
        raise SpecError("Say where the bundle goes with -o FOLDER.")
    result = compile_bundle(recipe, out, console=console, force=force)
    console.result(summary(result), _document(result))


def _recipe(given: dict[str, Any], file: Path | None) -> Recipe:
    from optimizer.recipe import checked, load_recipe
    from optimizer.known_models import remembered

    if file is None:
        if "model" not in given:
            raise SpecError("Say which MODEL to compile: a folder, a hub id or a .safetensors file.")
        return checked(given)
    written = load_recipe(file).model_dump(mode="json")
    if "model" not in given and not Path(written["model"]).exists() and written["digest"]:
        written["model"] = remembered(written["digest"]) or written["model"]
    return checked({**written, **given})


def _sizes(size_range: str | None, size: str | None) -> dict[str, int]:
    """The smallest and largest side that the options name."""
    if size_range and size:
        raise SpecError("Give --size or --size-range, not both.")
    text, separator, example = (
        (size_range, ":", "--size-range 256:1024") if size_range else (size, "x", "--size 512x512")
    )
    if text is None:
        return {}
    parts = text.lower().split(separator)
    if not 1 <= len(parts) <= 2 or not all(part.strip().isdecimal() for part in parts):
        raise SpecError(f"{text} is not a size: write it as {example}.")
    sides = [int(part) for part in parts]
    if size_range:
        return {"size_min": sides[0], "size_max": sides[-1]}
    return {"size_min": min(sides), "size_max": max(sides)}


def _plan_document(plan: Plan) -> dict[str, Any]:
    return {
        "model": plan.source.name,
        "family": plan.family.name,
        "profile": plan.profile.name,
        "recipe": plan.recipe.model_dump(mode="json"),
        "predicted_memory_bytes": plan.predicted_memory_bytes,
        "predicted_bytes": sum(job.predicted_bytes for job in plan.jobs),
        "components": [
            {
                "name": job.spec.name,
                "role": job.spec.role,
                "backend": job.backend,
                "quant": job.quant,
                "dtype": job.dtype,
                "predicted_bytes": job.predicted_bytes,
                "fp32_bytes": 4 * job.parameters,
                "layers_quantized": len(job.layers),
                "layers_total": job.layers_total,
                "checks": _checks(plan, job.spec.name),
            }
            for job in plan.jobs
        ],
    }


def _checks(plan: Plan, name: str) -> list[str]:
    from optimizer.calls import unseen_sizes

    job = next(job for job in plan.jobs if job.spec.name == name)
    runs = plan.calibration
    return [
        *(f"against fp32 at the unseen size {size}" for size in unseen_sizes(job.signature)),
        f"against fp32 on {len(runs.held_out)} recorded runs of {runs.steps} steps",
    ]


def _plan_text(plan: Plan) -> str:
    recipe, jobs = plan.recipe, plan.jobs
    lines = [
        f"{plan.source.name}: {plan.family.title}, {plan.native_size} px, profile {plan.profile.name}",
        f"sides {recipe.size_min} to {recipe.size_max} px in steps of {plan.size_step}, "
        f"{recipe.batch} pictures at once",
        f"{'component':<14}{'backend':<13}{'quant':<7}{'dtype':<7}{'low-bit layers':>15}{'size':>11}",
    ]
    for job in jobs:
        layers = f"{len(job.layers)} of {job.layers_total}"
        lines.append(
            f"{job.spec.name:<14}{job.backend:<13}{job.quant:<7}{job.dtype:<7}{layers:>15}"
            f"{job.predicted_bytes / 1e6:>8.1f} MB"
        )
    total = sum(job.predicted_bytes for job in jobs)
    fp32 = sum(4 * job.parameters for job in jobs)
    lines.append(
        f"predicted: {total / 1e6:.1f} MB on disk ({total / fp32:.2f}x of fp32), at most "
        f"{plan.predicted_memory_bytes / 2**30:.1f} GiB of memory while compiling"
    )
    lines.append("checks: " + "; ".join(_checks(plan, "unet")) + ", for every component")
    return "\n".join(lines)


def _document(result: CompileResult) -> dict[str, Any]:
    manifest = result.manifest
    fields = (
        "name role backend quant dtype engine_bytes fp32_bytes layers_quantized layers_total "
        "layers_low_bit sqnr_db oracle_sqnr_db"
    ).split()
    return {
        "bundle": str(result.bundle),
        "seconds": round(result.seconds, 3),
        "reused": result.reused,
        "key": manifest.key,
        "components": [entry.model_dump(mode="json", include=set(fields)) for entry in manifest.components],
        "speed": manifest.speed.model_dump(mode="json") if manifest.speed else None,
    }


def summary(result: CompileResult) -> str:
    """How much faster and smaller the bundle is, and how close its numbers are, in one line."""
    manifest = result.manifest
    state = "is up to date" if result.reused else f"made in {result.seconds:.0f} s"
    return f"{result.bundle} {state}: {quality_line(manifest)}"


def quality_line(manifest: Manifest) -> str:
    """Speed, size and closeness of the denoiser, as measured when it was compiled."""
    entry = manifest.component("denoiser")
    total = sum(item.engine_bytes for item in manifest.components)
    fp32 = sum(item.fp32_bytes for item in manifest.components)
    closeness = (
        "equal to fp32" if entry.sqnr_db == 200 else f"{entry.sqnr_db:.1f} dB SQNR to fp32"  # noqa: PLR2004
    )
    speed = f"{manifest.speed.speedup:.2f}x as fast a step as" if manifest.speed else "not timed against"
    return (
        f"{speed} diffusers eager fp32, {total / 1e6:.1f} MB ({total / fp32:.2f}x of fp32), denoiser "
        f"{entry.quant}/{entry.dtype} on {entry.backend} at {closeness}"
    )
