"""`kiln compile`: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from profiles.errors import SpecError
from runners.console import Console, quiet_libraries

if TYPE_CHECKING:
    from optimizer.recipe import Recipe

__all__ = ["compile_command"]


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
def compile_command(
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
    from optimizer import describe
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
        console.result(describe.plan_text(plan), describe.plan_document(plan))
        return
    if out is None:
        raise SpecError("Say where the bundle goes with -o FOLDER.")
    result = compile_bundle(recipe, out, console=console, force=force)
    console.result(describe.result_text(result), describe.result_document(result))


def _recipe(given: dict[str, Any], file: Path | None) -> Recipe:
    from optimizer.known_models import remembered
    from optimizer.recipe import checked, load_recipe

    if file is None:
        if "model" not in given:
            raise SpecError(
                "Say which MODEL to compile: a folder, a hub id or a .safetensors file."
            )
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
