"""`kiln compile` and `kiln analyze`: their options, and what they print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from profiles.errors import SpecError
from runners.console import Console, quiet_libraries
from runners.outputs import require_writable

if TYPE_CHECKING:
    from optimizer.recipe import Recipe

__all__ = ["analyze_command", "compile_command"]


@click.command("compile")
@click.argument("model", required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The bundle's folder.")
@click.option("--revision", help="Commit, tag or branch of a hub model.")
@click.option("--vae", metavar="DIR", help="Autoencoder for the model's own: a folder or hub id.")
@click.option("--vae-revision", help="Commit, tag or branch of a hub autoencoder.")
@click.option(
    "--controlnet", metavar="DIR[,DIR]", help="ControlNets beside it: folders or hub ids[@REV]."
)
@click.option(
    "--prediction-type", help="epsilon or v_prediction: of a single file [default: by its weights]"
)
@click.option(
    "--quant",
    help="none, int8, int4, auto, ... (see README), or several, best first: none,int8 "
    "[default: the profile's]",
)
@click.option(
    "--text-quant",
    help="int8w, int8-dyn, llm-int8, torchao-int8-dyn, int4 or nf4: of text encoders "
    "[default: kept]",
)
@click.option("--solver", help="rtn, mse, hqq, gptq or smoothquant [default: what suits the level]")
@click.option("--budget", metavar="0.25x|BYTES", help="With auto: the denoiser's size at most.")
@click.option("--min-quality", type=float, metavar="DB", help="With auto: the least SQNR.")
@click.option(
    "--sensitivity", type=click.Path(path_type=Path), help="With auto: a file of `kiln analyze`."
)
@click.option("--calibration", type=click.Path(path_type=Path), help="Text file, a prompt a line.")
@click.option("--calibration-size", type=int, metavar="SIDE", help="Pixels [default: the native]")
@click.option("--dtype", help="auto, fp32, bf16 or fp16: of what isn't quantized [default: auto]")
@click.option(
    "--backend", help="openvino, onnxruntime, tensorrt-rtx, aoti, eager [default: the profile's]"
)
@click.option(
    "--target", metavar="CARDS", help="rtx-4090, sm86,sm89 or portable: for other machines."
)
@click.option("--profile", help="Kind of machine to build for [default: this one's]")
@click.option("--size-range", metavar="MIN:MAX", help="Sides in pixels that must work.")
@click.option("--size", metavar="WxH", help="The one size that must work, such as 512x512.")
@click.option("--batch", type=int, help="Pictures at once that must work [default: 4]")
@click.option("--steps", type=int, help="Of calibration and measurement.")
@click.option(
    "--few-step", help="hyper, lcm, lightning or turbo: what the model was distilled with."
)
@click.option("--no-tiles", is_flag=True, help="No graphs for the VAE in seamless tiles.")
@click.option("--no-lora", is_flag=True, help="No second graphs, which LoRAs need.")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="A recipe's file.")
@click.option("--force", is_flag=True, help="Replace another bundle at -o.")
@click.option(
    "--verify",
    type=click.Choice(["changed", "always"]),
    default="changed",
    help="always: hash the model's files though they haven't changed since the last time.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
@click.option("-v", "--verbose", is_flag=True, help="Show what the tools print.")
def compile_command(
    model: str | None,
    out: Path | None,
    size_range: str | None,
    size: str | None,
    sensitivity: Path | None,
    calibration: Path | None,
    calibration_size: int | None,
    recipe_file: Path | None,
    verify: str,
    force: bool,  # noqa: FBT001
    dry_run: bool,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
    verbose: bool,  # noqa: FBT001
    revision: str | None,
    vae: str | None,
    vae_revision: str | None,
    controlnet: str | None,
    prediction_type: str | None,
    quant: str | None,
    text_quant: str | None,
    solver: str | None,
    budget: str | None,
    min_quality: float | None,
    dtype: str | None,
    backend: str | None,
    target: str | None,
    profile: str | None,
    batch: int | None,
    steps: int | None,
    few_step: str | None,
    no_lora: bool,  # noqa: FBT001
    no_tiles: bool,  # noqa: FBT001
) -> None:
    """Make a bundle from MODEL: a diffusers folder, a hub id, or a .safetensors checkpoint."""
    quiet_libraries()
    from optimizer import describe
    from optimizer.compile import compile_bundle, plan_recipe
    from optimizer.prompts import read_prompts

    console = Console(json_output=as_json, verbose=verbose)
    given = {
        "model": model,
        "revision": revision,
        "vae": vae,
        "vae_revision": vae_revision,
        "controlnets": controlnet and _names(controlnet),
        "prediction_type": prediction_type,
        **_levels(quant),
        "text_quant": text_quant,
        "solver": solver,
        "budget": budget,
        "min_quality": min_quality,
        "calibration": calibration and read_prompts(calibration),
        "calibration_size": calibration_size,
        "dtype": dtype,
        "backend": backend,
        "target": target,
        "profile": profile,
        "batch": batch,
        "steps": steps,
        "few_step": few_step,
        "lora": False if no_lora else None,
        "tiles": False if no_tiles else None,
        **_sizes(size_range, size),
    }
    recipe = _recipe({k: v for k, v in given.items() if v is not None}, recipe_file)
    always_hash = verify == "always"
    if dry_run:
        plan, _ = plan_recipe(recipe, sensitivity, console=console, always_hash=always_hash)
        console.result(describe.plan_text(plan), describe.plan_document(plan))
        return
    if out is None:
        raise SpecError("Say where the bundle goes with -o FOLDER.")
    result = compile_bundle(
        recipe,
        out,
        console=console,
        force=force,
        sensitivity=sensitivity,
        always_hash=always_hash,
    )
    console.result(describe.result_text(result), describe.result_document(result))


@click.command("analyze")
@click.argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="JSON file.")
@click.option("--revision", help="Commit, tag or branch of a hub model.")
@click.option("--solver", help="rtn, mse, hqq, gptq or smoothquant [default: gptq]")
@click.option("--backend", help="openvino, onnxruntime or eager [default: the profile's]")
@click.option("--steps", type=int, help="Of the denoising runs.")
@click.option("--calibration", type=click.Path(path_type=Path), help="Text file, a prompt a line.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
@click.option("-v", "--verbose", is_flag=True, help="Show what the tools print.")
def analyze_command(
    model: str,
    out: Path,
    revision: str | None,
    solver: str | None,
    backend: str | None,
    steps: int | None,
    calibration: Path | None,
    as_json: bool,  # noqa: FBT001
    verbose: bool,  # noqa: FBT001
) -> None:
    """Measure what each layer of MODEL loses under each scheme; killed, it goes on where it was."""
    quiet_libraries()
    from optimizer import describe
    from optimizer.compile import analyze_model
    from optimizer.deciding import pareto_front
    from optimizer.prompts import read_prompts
    from optimizer.quantize.sensitivity import load_sensitivity
    from optimizer.recipe import checked

    console = Console(json_output=as_json, verbose=verbose)
    if out.is_dir():
        raise SpecError(f"-o {out} is a folder: give a file name, such as {out / 'a.json'}.")
    require_writable(out)
    given = {
        "model": model,
        "revision": revision,
        "quant": "auto",
        "budget": "1x",
        "solver": solver,
        "backend": backend,
        "steps": steps,
        "calibration": calibration and read_prompts(calibration),
    }
    recipe = checked({k: v for k, v in given.items() if v is not None})
    plan, measured = analyze_model(recipe, console=console)
    found = load_sensitivity(measured)
    points = pareto_front(plan, found)
    out.write_bytes(measured.read_bytes())
    console.result(
        describe.analysis_text(found, points, out), describe.analysis_document(found, points, out)
    )


def _recipe(given: dict[str, Any], file: Path | None) -> Recipe:
    from optimizer.known_models import (
        remembered,
        remembered_autoencoder,
        remembered_controlnet,
    )
    from optimizer.recipe import checked, load_recipe

    if file is None:
        if "model" not in given:
            raise SpecError(
                "Say which MODEL to compile: a folder, a hub id or a .safetensors file."
            )
        return checked(given)
    written = load_recipe(file).model_dump(mode="json")
    for name, digest, place in (
        ("model", "digest", remembered),
        ("vae", "vae_digest", remembered_autoencoder),
    ):
        if name not in given and written[digest] and not Path(written[name]).exists():
            written[name] = place(written[digest]) or written[name]
    if "controlnets" in given:
        written["controlnet_digests"] = ()
    elif written["controlnet_digests"]:
        named = zip(written["controlnets"], written["controlnet_digests"], strict=True)
        written["controlnets"] = [
            name if Path(name).exists() else remembered_controlnet(digest) or name
            for name, digest in named
        ]
    return checked({**written, **given})


def _levels(quant: str | None) -> dict[str, Any]:
    """The first level, which the bundle runs at by default, and the others."""
    if quant is None:
        return {}
    first, *others = [level.strip() for level in quant.split(",")]
    return {"quant": first, "variants": others}


def _names(text: str) -> tuple[str, ...]:
    """The control networks that `--controlnet` names, between commas."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise SpecError(
            f"--controlnet {text} names nothing between two commas: write it as DIR or DIR,DIR."
        )
    return names


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
