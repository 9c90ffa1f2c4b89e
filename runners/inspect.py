"""`kiln inspect`: what a bundle was made of, for what, and how good it was measured to be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from profiles.target import sm
from runners.console import Console

if TYPE_CHECKING:
    from runners.manifest import Manifest

__all__ = ["inspect_command"]


@click.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The whole manifest as one JSON line.")
@click.option("--recipe", is_flag=True, help="The recipe alone, for `kiln compile --recipe`.")
def inspect_command(
    bundle: Path,
    as_json: bool,  # noqa: FBT001
    recipe: bool,  # noqa: FBT001
) -> None:
    """Show what is inside BUNDLE; its manifest is verified, its engines aren't opened."""
    from runners.bundle import read_manifest
    from runners.installed import located

    manifest = read_manifest(located(bundle))
    if recipe:
        Console(json_output=True).result("", manifest.recipe)
        return
    Console(json_output=as_json).result(_text(manifest), manifest.model_dump(mode="json"))


def _text(manifest: Manifest) -> str:
    model, recipe = manifest.model, manifest.recipe
    revision = f" at {model.revision}" if model.revision else ""
    lines = [
        f"model      {model.name}{revision} ({model.family}, {model.pipeline_class})",
        *_autoencoder(manifest),
        f"sizes      {recipe['size_min']} to {recipe['size_max']} px in steps of "
        f"{manifest.size_step}, native {manifest.native_size}; {recipe['batch']} at once",
        f"made by    kiln {manifest.kiln} on {manifest.observed.host.cpu.name}",
        "tools      " + ", ".join(f"{k} {v}" for k, v in manifest.tools.items() if k != "kiln"),
    ]
    if manifest.defaults:
        named = ", ".join(f"{name} {value:g}" for name, value in manifest.defaults.items())
        lines.append(f"default    {named}")
    if manifest.speed is not None:
        speed = manifest.speed
        lines.append(
            f"step       {speed.engine_ms:.1f} ms, diffusers fp32 {speed.eager_fp32_ms:.1f} ms: "
            f"{speed.speedup:.2f}x on {speed.threads} threads (load {speed.load_average}"
            f"{'' if speed.alone else f', other programs took {speed.others_share:.0%}: unsure'})"
        )
    lines.append(
        f"{'component':<16}{'backend':<18}{'quant':<10}{'dtype':<7}{'low-bit layers':>15}"
        f"{'bytes':>12}{'of fp32':>9}{'SQNR dB':>9}"
    )
    for entry in manifest.engines:
        layers = f"{entry.layers_quantized} of {entry.layers_total}"
        sqnr = "" if entry.sqnr_db is None else f"{entry.sqnr_db:.1f}"
        lines.append(
            f"{entry.name:<16}{entry.backend:<18}{entry.quant:<10}{entry.dtype:<7}{layers:>15}"
            f"{entry.engine_bytes:>12}{entry.engine_bytes / entry.fp32_bytes:>8.2f}x{sqnr:>9}"
        )
    if takers := [entry.name for entry in manifest.components if "lora" in entry.forms]:
        lines.append(f"LoRA       taken by {', '.join(takers)}")
    lines += _built_for(manifest)
    lines.append(f"key        {manifest.key}")
    return "\n".join(lines)


def _autoencoder(manifest: Manifest) -> list[str]:
    """What stands in the place of the model's own VAE, and the control networks, if any."""
    vae, lines = manifest.model.vae, []
    if vae is not None:
        revision = f" at {vae.revision}" if vae.revision else ""
        lines.append(f"vae        {vae.name}{revision} ({vae.class_name}), not the model's own")
    for control in manifest.model.controls:
        revision = f" at {control.revision}" if control.revision else ""
        lines.append(f"{control.component} {control.name}{revision} ({control.class_name})")
    return lines


def _built_for(manifest: Manifest) -> list[str]:
    """Which cards the engines are for, and that they haven't run yet where they haven't."""
    entry = manifest.component("denoiser")
    if entry.requires.capabilities is None:
        return []
    cards = ", ".join(sm(name) for name in entry.requires.capabilities) or "any NVIDIA card"
    state = "run where it was built"
    if not entry.ran:
        state = "run: not yet (the SQNR are those of its graph, run on a processor)"
    return [f"built for  {cards}; built: yes, {state}"]
