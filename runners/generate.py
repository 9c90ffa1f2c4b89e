"""`kiln generate`: prompts in, PNG files out, each saved as it is finished."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from profiles.errors import SpecError
from runners.console import Console, quiet_libraries
from runners.outputs import require_writable
from runners.signature import Dim

if TYPE_CHECKING:
    from runners.manifest import Manifest

__all__ = ["Request", "generate", "pictures"]


@dataclass(frozen=True)
class Request:
    """What to draw; None is what the bundle's model recommends, else the pipeline's own default."""

    prompt: str
    negative_prompt: str = ""
    steps: int | None = None
    guidance: float | None = None
    seed: int = -1
    """-1 draws one; picture i of a request uses seed + i."""
    count: int = 1
    batch: int = 1
    """Pictures at once."""
    width: int | None = None
    height: int | None = None
    scheduler: str | None = None


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="What the picture shows.")
@click.option("--negative", default="", help="What it should not show.")
@click.option("--steps", type=int, help="Denoising steps [default: the model's]")
@click.option("--guidance", type=float, help="Classifier-free guidance [default: the model's]")
@click.option("--seed", type=int, default=-1, help="-1 draws one; picture i uses seed + i.")
@click.option("--count", type=int, default=1, help="Pictures to make.")
@click.option("--batch", type=int, default=1, help="Pictures at once.")
@click.option("--size", metavar="WxH", help="Pixels [default: the model's native size]")
@click.option("--scheduler", help="euler, euler_a, dpmpp_2m_karras, ddim, unipc, lcm, ...")
@click.option("--threads", type=int, help="CPU threads [default: the physical cores]")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="PNG file.")
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
    threads: int | None,
    out: Path,
    as_json: bool,  # noqa: FBT001
    verbose: bool,  # noqa: FBT001
) -> None:
    """Make pictures with BUNDLE; with --count N they are OUT-0001.png and so on."""
    if not verbose:
        quiet_libraries()
    console = Console(json_output=as_json, verbose=verbose)
    width, height = _size(size)
    request = Request(
        prompt, negative, steps, guidance, seed, count, batch, width, height, scheduler
    )
    _check_request(request, threads)
    names = _names(out, count)
    with console.stage(f"Load {bundle}"):
        from runners.pipeline import load

        pipeline = load(bundle, threads=threads)
    start = time.monotonic()
    saved: list[dict[str, Any]] = []
    try:
        from runners.metadata import save_picture

        for (image, facts), path in zip(_shown(pipeline, request, console), names, strict=True):
            save_picture(image, path, facts)
            saved.append({"file": str(path), "seed": facts["seed"]})
    finally:
        pipeline.kiln.close()
    seconds = time.monotonic() - start
    document = {"images": saved, "seconds": round(seconds, 3), **facts}
    document.pop("seed")
    last = f" to {saved[-1]['file']}" if count > 1 else ""
    text = f"{saved[0]['file']}{last}: {seconds / count:.2f} s a picture, seed {saved[0]['seed']}"
    console.result(text, document)


def _shown(pipeline: Any, request: Request, console: Console) -> Iterator[tuple[Any, Any]]:
    """The pictures, with a progress bar over all steps."""
    rounds = -(-request.count // request.batch)
    with console.stage(f"Draw {request.count}") as stage:
        done = 0

        def step(_pipe: Any, _index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            nonlocal done
            done += 1
            stage.progress(done, max(rounds * _pipe.num_timesteps, done))
            return values

        yield from pictures(pipeline, request, on_step=step)


def pictures(pipeline: Any, request: Request, *, on_step: Any = None) -> Iterator[tuple[Any, Any]]:
    """Draw the request with a pipeline of `runners.load`: (PIL image, its facts), one by one.

    The noise of every picture is drawn on the CPU from its own seed, so a seed means the same
    picture in any batch and on any machine. Raises SpecError for sizes that the engines weren't
    compiled for, with the nearest legal one.
    """
    manifest = pipeline.kiln.manifest
    if request.scheduler is not None:
        from runners.schedulers import with_scheduler

        with_scheduler(pipeline, request.scheduler)
    native = sides_of(manifest).nearest(manifest.native_size)
    width = native if request.width is None else request.width
    height = width if request.height is None else request.height
    check_size(manifest, width, height)
    check_batch(manifest, request.batch)
    seed = request.seed if request.seed >= 0 else secrets.randbelow(2**32)
    settings = {
        "num_inference_steps": request.steps or manifest.defaults.get("steps"),
        "guidance_scale": (
            request.guidance if request.guidance is not None else manifest.defaults.get("guidance")
        ),
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    for first in range(0, request.count, request.batch):
        seeds = [seed + i for i in range(first, min(first + request.batch, request.count))]
        images = _draw(pipeline, request, (width, height), seeds, {**settings, "on": on_step})
        for image, own in zip(images, seeds, strict=True):
            facts = {
                **asdict(request),
                "width": width,
                "height": height,
                "steps": pipeline.num_timesteps,
                "guidance": pipeline.guidance_scale,
                "seed": own,
                "scheduler": type(pipeline.scheduler).__name__,
                "model": manifest.model.name,
                "model_digest": manifest.model.digest,
                "bundle": manifest.key,
                "kiln": manifest.kiln,
            }
            for unneeded in ("count", "batch"):
                facts.pop(unneeded)
            yield image, facts


def _draw(
    pipeline: Any, request: Request, size: tuple[int, int], seeds: list[int], how: dict[str, Any]
) -> list[Any]:
    import torch

    on_step = how.pop("on")
    result = pipeline(
        prompt=[request.prompt] * len(seeds),
        negative_prompt=[request.negative_prompt] * len(seeds),
        width=size[0],
        height=size[1],
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        callback_on_step_end=on_step,
        **how,
    )
    images: list[Any] = result.images
    return images


def sides_of(manifest: Manifest) -> Dim:
    """The sides in pixels that the bundle's engines were compiled for."""
    low, high = manifest.recipe["size_min"], manifest.recipe["size_max"]
    return Dim(name="side", min=low, opt=low, max=high, multiple_of=manifest.size_step)


def check_size(manifest: Manifest, width: int, height: int) -> None:
    """Raise SpecError, with the nearest legal size, unless the engines were compiled for it."""
    side = sides_of(manifest)
    if side.legal(width) and side.legal(height):
        return
    raise SpecError(
        f"--size {width}x{height} is not among the sizes that the bundle was compiled for "
        f"(sides of {side.describe()}): use {side.nearest(width)}x{side.nearest(height)}."
    )


def check_batch(manifest: Manifest, batch: int) -> None:
    """Raise SpecError unless the engines were compiled for so many pictures at once."""
    most = manifest.recipe["batch"]
    if batch > most:
        raise SpecError(
            f"--batch {batch} is more than the {most} that the bundle was compiled for: use "
            f"--batch {most}, or compile with --batch {batch}."
        )


def _check_request(request: Request, threads: int | None) -> None:
    least = {
        "--steps": request.steps,
        "--count": request.count,
        "--batch": request.batch,
        "--threads": threads,
    }
    for name, value in least.items():
        if value is not None and value < 1:
            raise SpecError(f"{name} {value} is not possible: use 1 or more.")
    if request.seed < -1:
        raise SpecError(f"--seed {request.seed} is not possible: use 0 or more, or -1 to draw one.")
    if request.seed + request.count > 2**63:
        raise SpecError(f"--seed {request.seed} is too large: use less than 2^63 - count.")
    if request.guidance is not None and not 0 <= request.guidance <= 1000:
        raise SpecError(f"--guidance {request.guidance} is not possible: use 0 to 1000.")


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    parts = text.lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(part.strip().isdecimal() for part in parts):
        raise SpecError(f"--size {text} is not a size: write it as WIDTHxHEIGHT, such as 512x512.")
    return int(parts[0]), int(parts[-1])


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
