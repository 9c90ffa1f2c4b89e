"""`kiln generate`: prompts and pictures in, PNG files out, each saved as it is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click

import runners
from profiles.errors import SpecError
from runners.console import Console, quiet_libraries
from runners.control_options import parse_control
from runners.lora_choices import choices_of, lora_folders
from runners.outputs import require_writable
from runners.requests import Request, check_request, outpaint_of, size_of
from runners.way_options import wanted_of, way_options

__all__ = ["generate"]

_FILE = click.Path(path_type=Path)


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """Everything that a Request holds, in the order of the help text."""
    options = [
        click.option("--prompt", required=True, help="What the picture shows; (word:1.2) weighs."),
        click.option("--negative", default="", help="What it should not show."),
        click.option("--steps", type=int, help="Denoising steps [default: the model's]"),
        click.option("--guidance", type=float, help="Guidance scale [default: the model's]"),
        click.option("--seed", type=int, default=-1, help="-1 draws one; picture i uses seed + i."),
        click.option("--count", type=int, default=1, help="Pictures to make."),
        click.option("--batch", type=int, default=1, help="Pictures at once."),
        click.option("--size", metavar="WxH", help="Pixels [default: the model's or the image's]"),
        click.option("--scheduler", help="euler, euler_a, dpmpp_2m_karras, ddim, unipc, lcm, ..."),
        click.option("--image", type=_FILE, help="Picture to start from."),
        click.option("--strength", type=float, help="Of the noise on --image: 0 none, 1 all."),
        click.option("--mask", type=_FILE, help="White where --image is repainted."),
        click.option("--outpaint", metavar="L,T,R,B", help="Pixels to extend --image by."),
        click.option("--lora", "loras", multiple=True, metavar="FILE[:WEIGHT]", help="Repeatable."),
        click.option(
            "--lora-dir",
            "lora_dirs",
            multiple=True,
            type=_FILE,
            help="Where <lora:name:0.8> in a prompt is looked up [default: KILN_LORA_DIRS]",
        ),
        click.option(
            "--control",
            "controls",
            multiple=True,
            metavar="[canny:|depth:]FILE[:WEIGHT[:START-END]]",
            help="Control image, one a network of the bundle, in its order, or NETWORK=FILE.",
        ),
        click.option(
            "--depth-model",
            type=_FILE,
            metavar="DIR",
            help="Depth estimator of --control depth: [default: KILN_DEPTH_MODEL]",
        ),
        click.option(
            "--clip-skip", type=int, help="1 the text encoder's last layer, 2 the one before, ..."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("bundle", type=_FILE)
@_options
@way_options
@click.option("--threads", type=int, help="CPU threads [default: the physical cores]")
@click.option("--trust", type=_FILE, help="NAME.pub or trust file [default: `kiln trust ls`]")
@click.option(
    "--verify",
    type=click.Choice(["changed", "always"]),
    default="changed",
    help="always: hash large files though they haven't changed since the last time.",
)
@click.option("-o", "--out", type=_FILE, required=True, help="PNG file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
@click.option("-v", "--verbose", is_flag=True, help="Show what the libraries print.")
def generate(
    bundle: Path,
    prompt: str,
    negative: str,
    steps: int | None,
    guidance: float | None,
    seed: int,
    count: int,
    batch: int,
    size: str | None,
    scheduler: str | None,
    image: Path | None,
    strength: float | None,
    mask: Path | None,
    outpaint: str | None,
    controls: tuple[str, ...],
    depth_model: Path | None,
    loras: tuple[str, ...],
    lora_dirs: tuple[Path, ...],
    clip_skip: int | None,
    memory: str | None,
    variant: str | None,
    residency: Literal["keep", "sequential"] | None,
    tiled: bool | None,  # noqa: FBT001
    allow_variant_fallback: bool,  # noqa: FBT001
    threads: int | None,
    trust: Path | None,
    verify: Literal["changed", "always"],
    out: Path,
    as_json: bool,  # noqa: FBT001
    verbose: bool,  # noqa: FBT001
) -> None:
    """Make pictures with BUNDLE; with --count N they are OUT-0001.png and so on.

    BUNDLE is a bundle's folder, or the name of an installed one.
    """
    if not verbose:
        quiet_libraries()
    width, height = size_of(size)
    chosen, plain = choices_of(loras, prompt, lora_folders(lora_dirs))
    request = Request(
        prompt=plain,
        negative_prompt=negative,
        steps=steps,
        guidance=guidance,
        seed=seed,
        count=count,
        batch=batch,
        width=width,
        height=height,
        scheduler=scheduler,
        image=image,
        mask=mask,
        outpaint=outpaint_of(outpaint),
        strength=strength,
        clip_skip=clip_skip,
        controls=tuple(parse_control(text, depth_model) for text in controls),
        loras=chosen,
    )
    if threads is not None and threads < 1:
        raise SpecError(f"--threads {threads} is not possible: use 1 or more.")
    check_request(request)
    wanted = wanted_of(
        memory, variant, residency=residency, tiled=tiled, falls_back=allow_variant_fallback
    )
    names = _names(out, count)
    console = Console(json_output=as_json, verbose=verbose)
    load = partial(runners.load, bundle, threads=threads, trust=trust, verify=verify)
    task, pipeline = _loaded(bundle, request, wanted, load, console)
    _draw(pipeline, task, names, console)


@dataclass(frozen=True)
class _Task:
    """A request, what it means for the bundle, and the ways to draw it."""

    request: Request
    drawing: Any
    controls: Any
    ladder: Any


def _loaded(
    bundle: Path,
    request: Request,
    wanted: Any,
    load: partial[Any],
    console: Console,
) -> tuple[_Task, Any]:
    """What is to be drawn and the pipeline; every picture is read, and the way is chosen, before
    the bundle loads.
    """
    from runners.bundle import trusted_manifest
    from runners.choosing import chosen
    from runners.compatibility import require_compatible
    from runners.control_images import controls_of
    from runners.drawing import drawing_of
    from runners.installed import located
    from runners.selftest import facts_for
    from runners.trust import load_trust

    bundle = located(bundle)
    manifest = trusted_manifest(bundle, trust=load_trust(load.keywords["trust"]))
    drawing = drawing_of(request, manifest)
    controls = controls_of(request.controls, manifest, drawing)
    facts = facts_for(manifest)
    require_compatible(manifest, facts, manifest.denoiser(wanted.variant).quant)
    choice = chosen(
        manifest, request, drawing.size, wanted, facts=lambda: facts, controls=controls.networks
    )
    console.info(choice.sentence)
    way = choice.ladder.way
    with console.stage(f"Load {bundle}"):
        pipeline = load(
            task=request.task,
            variant=way.variant,
            residency=way.residency,
            controlnets=controls.networks,
        )
    choice.ladder.set(pipeline)
    return _Task(request, drawing, controls, choice.ladder), pipeline


def _draw(pipeline: Any, task: _Task, names: list[Path], console: Console) -> None:
    """Draw and save, each picture as it is finished, and release the engines."""
    from runners import metadata

    start = time.monotonic()
    saved: list[dict[str, Any]] = []
    try:
        shown = _shown(pipeline, task, console)
        for (image, facts), path in zip(shown, names, strict=True):
            metadata.save_picture(image, path, facts)
            saved.append({"file": str(path), "seed": facts.pop("seed")})
    finally:
        pipeline.kiln.close()
    seconds = time.monotonic() - start
    last = f" to {saved[-1]['file']}" if len(names) > 1 else ""
    console.result(
        f"{saved[0]['file']}{last}: {seconds / len(names):.2f} s a picture, seed "
        f"{saved[0]['seed']}",
        {"images": saved, "seconds": round(seconds, 3), **facts},
    )


def _shown(pipeline: Any, task: _Task, console: Console) -> Iterator[Any]:
    """The pictures, with a progress bar over all steps."""
    from runners.workflows import pictures

    request = task.request
    rounds = -(-request.count // task.ladder.way.batch)
    with console.stage(f"Draw {request.count}") as stage:
        done = 0

        def step(_pipe: Any, _index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            nonlocal done
            done += 1
            stage.progress(done, max(rounds * _pipe.num_timesteps, done))
            return values

        yield from pictures(
            pipeline,
            request,
            drawing=task.drawing,
            controls=task.controls,
            on_step=step,
            say=console.info,
            ladder=task.ladder,
        )


def _names(out: Path, count: int) -> list[Path]:
    """Where the pictures go; SpecError where they can't be written."""
    if out.suffix.lower() != ".png":
        raise SpecError(f"-o {out} should end in .png, the only format that is written.")
    if out.is_dir():
        raise SpecError(f"-o {out} is a folder: give a file name in it, such as {out / 'a.png'}.")
    require_writable(out)
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i:04}{out.suffix}") for i in range(1, count + 1)]
