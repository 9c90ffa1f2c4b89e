"""`kiln plan`: what fits into how much memory, before anything is opened or compiled."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from profiles.errors import MissingError, SpecError
from runners.console import Console
from runners.requests import size_of

if TYPE_CHECKING:
    from profiles.facts import Facts
    from runners.memory import Residency
    from runners.outlook import Outlook

__all__ = ["plan_command"]

_OF_MODELS = "optimizer.outlook:model_outlook"
"""What plans for models, where the optimizer is installed."""


@click.command("plan")
@click.argument("model")
@click.option("--memory", metavar="8GiB", help="At most [default: what is free now]")
@click.option("--size", metavar="WxH", help="Pixels [default: the model's native size]")
@click.option("--batch", type=int, default=1, help="Pictures at once.")
@click.option("--variant", help="Only this level of the denoiser: none, int8, int4.")
@click.option("--residency", type=click.Choice(["keep", "sequential"]), help="Only this one.")
@click.option("--tiled/--no-tiled", default=None, help="Only with the VAE in tiles, or without.")
@click.option("--backend", help="Of a model [default: the profile's]")
@click.option("--host", type=click.Path(path_type=Path), help="A file of `kiln doctor --json`.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
def plan_command(
    model: str,
    memory: str | None,
    size: str | None,
    batch: int,
    variant: str | None,
    residency: Residency | None,
    tiled: bool | None,  # noqa: FBT001
    backend: str | None,
    host: Path | None,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Predict the peak of every way to run MODEL, and pick the best one that fits.

    MODEL is a bundle, the name of an installed one, a diffusers folder, a hub id, or a family's
    name (sd1, sdxl, sd3, flux). Of models only configs are read.
    """
    from profiles.facts import load_facts, read_facts
    from runners import outlook as outlooks
    from runners.memory import rows

    console = Console(json_output=as_json)
    given = outlooks.memory_of(memory) if memory else None
    facts = load_facts(host) if host else read_facts()
    for fact in facts.unread if host else ():
        console.info(f"{host} doesn't tell everything: {fact}")
    outlook = _outlook(model, facts, backend)
    budget = outlooks.budget_of(facts, outlook.device, given)
    width, height = size_of(size)
    width = width or outlook.side.nearest(outlook.native)
    asked = outlook.asked(width, height or width, batch)
    if variant is not None and variant not in outlook.parts.denoisers:
        known = ", ".join(outlook.parts.denoisers)
        raise SpecError(f"--variant {variant} isn't there: {model} has {known}.")
    if tiled and max(asked.width, asked.height) <= outlook.parts.tile:
        raise SpecError(
            f"--tiled is for pictures larger than a tile ({outlook.parts.tile} px): leave it out, "
            "or give a larger --size."
        )
    found = rows(outlook.parts, asked, variant=variant, residency=residency, tiled=tiled)
    said = outlooks.document(outlook, found, budget)
    said = {**said, "width": asked.width, "height": asked.height, "unread": list(facts.unread)}
    console.result("\n".join(outlooks.lines(said, budget.what)), said)


def _outlook(model: str, facts: Facts, backend: str | None) -> Outlook:
    from runners.bundle import MANIFEST_NAME, read_manifest
    from runners.installed import located
    from runners.outlook import outlook_of

    folder = located(Path(model))
    if (folder / MANIFEST_NAME).is_file():
        if backend is not None:
            raise SpecError(
                f"--backend is for models: {model} is a bundle, whose engines are built."
            )
        return outlook_of(read_manifest(folder), model)
    module, function = _OF_MODELS.split(":")
    try:
        plan_model: Any = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        raise MissingError(
            f"{model} is no bundle, and planning for a model needs {error.name}, which isn't "
            'installed: run pip install "kiln-diffusion[compile,cpu]".'
        ) from error
    found: Outlook = plan_model(model, facts, backend)
    return found
