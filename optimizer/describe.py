"""What `kiln compile` says: plans and results as text and as JSON documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimizer.backends import backend
from optimizer.calls import unseen_sizes
from optimizer.compile import CompileResult
from optimizer.job import Job
from optimizer.numerics import EXACT_DB
from optimizer.plan import Plan
from optimizer.quantize.budget import Solved
from optimizer.quantize.policy import LEVELS
from optimizer.quantize.schemes import W4A16, W8A8, Nvfp4
from optimizer.quantize.sensitivity import Sensitivity, sqnr_of
from profiles.target import sm
from runners.manifest import Manifest
from runners.part_names import AFTER

__all__ = [
    "analysis_document",
    "analysis_text",
    "plan_document",
    "plan_text",
    "result_document",
    "result_text",
]

_WORST = 8

_RESULT_FIELDS = {
    "name",
    "role",
    "backend",
    "quant",
    "dtype",
    "engine_bytes",
    "fp32_bytes",
    "layers_quantized",
    "layers_total",
    "layers_low_bit",
    "sqnr_db",
    "oracle_sqnr_db",
}


def plan_document(plan: Plan) -> dict[str, Any]:
    """The plan for --dry-run --json."""
    return {
        "model": plan.source.name,
        "vae": plan.source.vae and plan.source.vae.name,
        "controlnets": [control.name for control in plan.source.controls],
        "family": plan.family.name,
        "profile": plan.profile.name,
        "recipe": plan.recipe.model_dump(mode="json"),
        "adapted": _adapted(plan),
        "scheduler": plan.drawn.scheduler,
        "defaults": plan.drawn.defaults,
        "predicted_memory_bytes": plan.predicted_memory_bytes,
        "predicted_bytes": sum(job.bundle_bytes for job in plan.jobs),
        "components": [
            {
                "name": job.name,
                "role": job.spec.role,
                "backend": job.backend,
                "quant": job.quant,
                "dtype": job.dtype,
                "predicted_bytes": job.bundle_bytes,
                "fp32_bytes": 4 * job.parameters,
                "layers_quantized": len(job.layers),
                "layers_total": job.layers_total,
                "attention": backend(job.backend).attention,
                "forms": job.forms,
                "checks": _checks(plan, job),
            }
            for job in plan.jobs
        ],
    }


def plan_text(plan: Plan) -> str:
    """The plan for people: decisions, a row a component, predictions, checks."""
    recipe, jobs = plan.recipe, plan.jobs
    width = 2 + max(len(job.name) for job in jobs)
    lines = [
        f"{plan.source.name}: {plan.family.title}, {plan.native_size} px; "
        f"profile {plan.profile.name}",
        *_autoencoder(plan),
        f"sides {recipe.size_min} to {recipe.size_max} px in steps of {plan.size_step}, "
        f"{recipe.batch} pictures at once",
        f"{'component':<{width}}{'backend':<13}{'quant':<7}{'dtype':<7}{'low-bit layers':>15}"
        f"{'size':>11}  checks",
    ]
    for job in jobs:
        layers = f"{len(job.layers)} of {job.layers_total}"
        lines.append(
            f"{job.name:<{width}}{job.backend:<13}{job.quant:<7}{job.dtype:<7}{layers:>15}"
            f"{job.bundle_bytes / 1e6:>8.1f} MB  fp32 at {' and '.join(_unseen(job))}, recorded"
        )
    lines += [_policy_line(plan), _lora_line(plan), _tiles_line(plan), *_adapted(plan)]
    total = sum(job.bundle_bytes for job in jobs)
    fp32 = sum(4 * job.parameters for job in jobs)
    runs = plan.calibration
    lines += [
        f"predicted: {total / 1e6:.1f} MB on disk ({total / fp32:.2f}x of fp32), at most "
        f"{plan.predicted_memory_bytes / 2**30:.1f} GiB of memory while compiling",
        f"runs: {len(runs.prompts)} to calibrate, {len(runs.held_out)} held out to check, "
        f"{runs.steps} steps each with {plan.drawn.scheduler['_class_name']}",
    ]
    return "\n".join(lines)


def analysis_document(found: Sensitivity, points: Sequence[Solved], out: Path) -> dict[str, Any]:
    """What was measured, for --json."""
    return {
        "sensitivity": str(out),
        "layers": len(found.layers),
        "calls": found.calls,
        "front": [
            {
                "bytes": point.bytes,
                "bytes_vs_fp32": round(point.ratio, 4),
                "predicted_sqnr_db": round(point.db, 2),
                "schemes": point.counts,
            }
            for point in points
        ],
    }


def analysis_text(found: Sensitivity, points: Sequence[Solved], out: Path) -> str:
    """The layers that lose most, and the front."""
    lines = [f"{'layer that loses most':<62}{'scheme':>12}{'alone':>10}"]
    for name, loss in found.most_sensitive(_WORST):
        lines.append(f"{name:<62}{loss.scheme.label:>12}{sqnr_of(loss.noise):>7.1f} dB")
    lines.append("best policies:")
    lines += [f"  {point.describe()}" for point in points]
    lines.append(f"{out}: use it with `kiln compile MODEL --quant auto --sensitivity {out}`")
    return "\n".join(lines)


def result_document(result: CompileResult) -> dict[str, Any]:
    """What was made, for --json."""
    manifest = result.manifest
    return {
        "bundle": str(result.bundle),
        "seconds": round(result.seconds, 3),
        "reused": result.reused,
        "key": manifest.key,
        "components": [
            entry.model_dump(mode="json", include=_RESULT_FIELDS) for entry in manifest.engines
        ],
        "speed": manifest.speed.model_dump(mode="json") if manifest.speed else None,
    }


def result_text(result: CompileResult) -> str:
    """How much faster and smaller the bundle is, and how close its numbers are, in one line."""
    state = "is up to date" if result.reused else f"made in {result.seconds:.0f} s"
    return f"{result.bundle} {state}: {_quality(result.manifest)}"


def _quality(manifest: Manifest) -> str:
    entry = manifest.component("denoiser")
    total = sum(item.engine_bytes for item in manifest.engines)
    fp32 = sum(item.fp32_bytes for item in manifest.engines)
    parts = [
        f"{total / 1e6:.1f} MB ({total / fp32:.2f}x of fp32)",
        f"denoiser {entry.quant}/{entry.dtype} on {entry.backend}",
    ]
    if manifest.speed is not None and manifest.speed.alone:
        parts.insert(0, f"a step {manifest.speed.speedup:.2f}x as fast as diffusers in fp32")
    elif manifest.speed is not None:
        share = f"{manifest.speed.others_share:.0%}"
        parts.insert(0, f"speed unsure, as other programs took {share} of the processor")
    if manifest.variants:
        parts[-1] += f" (also {', '.join(item.quant for item in manifest.variants)})"
    if entry.sqnr_db is not None:
        exact = entry.sqnr_db == EXACT_DB
        parts.append("equal to fp32" if exact else f"{entry.sqnr_db:.1f} dB SQNR to fp32")
    return ", ".join(parts)


def _autoencoder(plan: Plan) -> list[str]:
    vae = plan.source.vae
    lines = [] if vae is None else [f"vae {vae.name} ({vae.class_name}), not the model's own"]
    named = zip(plan.source.control_folders, plan.source.controls, strict=True)
    return lines + [f"{folder} {control.name} ({control.class_name})" for folder, control in named]


def _tiles_line(plan: Plan) -> str:
    """How pictures larger than the native size may be coded in tiles."""
    side = plan.native_size
    if any(AFTER in job.forms for job in plan.jobs):
        return f"tiles: seamless ones of {side} px, two more graphs over the weights of each half"
    if max(plan.recipe.size_max or 0, side) == side:
        return "tiles: none, no picture is larger than one"
    why = "as --no-tiles says" if not plan.recipe.tiles else "the VAE's graphs can't be cut here"
    return f"tiles: blended ones of {side} px, {why}"


def _lora_line(plan: Plan) -> str:
    """Which engines will take LoRAs, or why none."""
    names = [job.spec.name for job in plan.jobs if "lora" in job.forms]
    if names:
        whole = backend(plan.denoiser.backend).whole_forms
        what = "engine with the weights once more" if whole else "graph over the same weights"
        return f"LoRA: a second {what} for {', '.join(names)}"
    if not plan.recipe.lora:
        return "LoRA: left out, as --no-lora says"
    if plan.source.kind == "onnx":
        return "LoRA: none, graphs that were exported elsewhere don't name their layers"
    return f"LoRA: none, engines of {plan.denoiser.backend} don't take them yet"


def _policy_line(plan: Plan) -> str:
    job = plan.denoiser
    if plan.undecided:
        goal = plan.recipe.budget or f"{plan.recipe.min_quality:g} dB"
        return f"policy of {job.spec.name}: solved for after measuring, within {goal}"
    counts = Counter(scheme.label for scheme in job.layers.values())
    counts["kept"] = job.layers_total - len(job.layers)
    layers = ", ".join(f"{count} {label}" for label, count in sorted(counts.items()))
    return f"policy of {job.spec.name}: {layers}; solver {job.policy.solver}"


def _adapted(plan: Plan) -> list[str]:
    """What the backend can't have of the level that was asked for, and what it gets instead."""
    job = plan.denoiser
    known, level = backend(job.backend), LEVELS.get(str(plan.recipe.quant))
    lines = []
    if isinstance(level, W8A8) and not known.zero_points:
        lines.append(f"{known.name} takes no zero points: inputs are rounded around 0")
    if isinstance(level, W4A16 | Nvfp4) and 4 not in known.int4_axes:
        lines.append(f"{known.name} takes no convolutions in 4 bits: they get 8")
    if plan.recipe.target is not None:
        cards = ", ".join(sm(name) for name in job.capabilities) or "any card"
        lines.append(
            f"built here for {cards}; the graph is checked on this processor, the engine where it "
            "first runs"
        )
    return lines


def _checks(plan: Plan, job: Job) -> list[str]:
    runs = plan.calibration
    return [
        *(f"against fp32 at the unseen size {size}" for size in _unseen(job)),
        f"against fp32 on {len(runs.held_out)} recorded runs of {runs.steps} steps",
    ]


def _unseen(job: Job) -> list[str]:
    return list(unseen_sizes(job.signature))
