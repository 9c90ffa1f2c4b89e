"""A request drawn with a pipeline of `runners.load`: text to image, image to image, repainting."""

from __future__ import annotations

import inspect
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from profiles.errors import SpecError
from runners.control_images import Controls, controls_of
from runners.drawing import Drawing, drawing_of
from runners.ladder import Ladder
from runners.requests import Request
from runners.schedulers import spreads_steps, with_scheduler

__all__ = ["pictures"]

OnStep = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""diffusers' callback_on_step_end."""


def pictures(
    pipeline: Any,
    request: Request,
    *,
    drawing: Drawing | None = None,
    controls: Controls | None = None,
    on_step: OnStep | None = None,
    say: Callable[[str], None] | None = None,
    ladder: Ladder | None = None,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Draw the request: (PIL image, its facts), one by one.

    `pipeline` is of the request's task; `drawing` is `drawing_of(request, manifest)` and `controls`
    the same of `controls_of`, where they were called already; `say` gets a sentence for whatever is
    fitted or cut. The noise of every picture is drawn on the CPU from its own seed, so a seed means
    the same picture in any batch and on any machine. Where memory runs out, `ladder` (default:
    none) has the ways that are tried instead. Raises SpecError for what can't be drawn, with the
    nearest that can, OutOfMemory where no way is left; pictures that were given before are whole.
    """
    from runners.lora_adapters import use_loras
    from runners.prompting import prompts_of

    if request.scheduler is not None:
        with_scheduler(pipeline, request.scheduler)
    manifest = pipeline.kiln.manifest
    drawing = drawing or drawing_of(request, manifest)
    controls = controls or controls_of(request.controls, manifest, drawing)
    lora_facts = use_loras(pipeline, request.loras)
    settings = _settings(pipeline, request, drawing)
    ladder = ladder or Ladder.of(pipeline, request.batch)
    texts = request.prompt, request.negative_prompt
    encode = partial(prompts_of, pipeline, *texts, clip_skip=request.clip_skip)
    prompts = ladder.run(pipeline, encode, say)
    for note in (
        *drawing.notes,
        *controls.notes,
        *prompts.notes,
        *_notes(pipeline, request, settings),
    ):
        if say is not None:
            say(note)
    cell = pipeline.vae_scale_factor
    seed = request.seed if request.seed >= 0 else secrets.randbelow(2**32)
    first = 0

    def draw() -> list[tuple[Any, int]]:
        count = min(ladder.way.batch, request.count - first)
        seeds = [seed + i for i in range(first, first + count)]
        drawn = pipeline(
            **prompts.arguments(count),
            **drawing.arguments(count, cell=cell),
            **controls.arguments(request.task),
            **settings,
            generator=_generators(seeds),
            callback_on_step_end=on_step,
        ).images
        return list(zip(drawn, seeds, strict=True))

    own_facts = {**drawing.facts, **controls.facts, **prompts.facts, **lora_facts}
    while first < request.count:
        made = ladder.run(pipeline, draw, say)
        facts = {**_facts(pipeline, request, settings), **own_facts}
        facts["way"] = asdict(ladder.way)
        for image, own in made:
            result = drawing.finished(image, cell=cell)
            yield result, {**facts, "width": result.width, "height": result.height, "seed": own}
        first += len(made)


def _generators(seeds: list[int]) -> list[Any]:
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def _settings(pipeline: Any, request: Request, drawing: Drawing) -> dict[str, Any]:
    """Steps, guidance and strength as the request, the model or the pipeline's class has them, and
    the size, where the class doesn't take that of the image anyway.
    """
    parameters = _parameters(pipeline)
    defaults = pipeline.kiln.manifest.defaults
    wanted = {
        "num_inference_steps": request.steps or defaults.get("steps"),
        "guidance_scale": (
            request.guidance if request.guidance is not None else defaults.get("guidance")
        ),
        "strength": request.strength,
        "width": drawing.size[0],
        "height": drawing.size[1],
    }
    settings = {
        name: parameters[name].default if value is None else value
        for name, value in wanted.items()
        if name in parameters
    }
    if request.steps is None:
        settings["num_inference_steps"] = _enough_steps(pipeline, settings)
    _check_steps(pipeline, settings)
    return settings


def _parameters(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipeline).__call__).parameters


def _most_steps(pipeline: Any) -> int | None:
    """The steps that a consistency model was distilled on; what it runs are some of them."""
    if not spreads_steps(pipeline.scheduler.set_timesteps):
        return None
    return int(pipeline.scheduler.config.original_inference_steps)


def _runs_all(pipeline: Any) -> bool:
    """Whether an image's strength moves all steps instead of leaving some out."""
    return spreads_steps(type(pipeline).__call__)


def _enough_steps(pipeline: Any, settings: dict[str, Any]) -> int:
    """The default steps, or as many as it takes to run one at an image's strength."""
    steps, strength = int(settings["num_inference_steps"]), settings.get("strength")
    if not strength or _runs_all(pipeline):
        return steps
    least = math.ceil(1 / strength)
    return max(steps, least) if least <= (_most_steps(pipeline) or least) else steps


def _check_steps(pipeline: Any, settings: dict[str, Any]) -> None:
    """Raise SpecError for steps that the scheduler or an image's strength has no place for."""
    steps, strength = int(settings["num_inference_steps"]), settings.get("strength")
    if (most := _most_steps(pipeline)) is not None:
        part = strength if _runs_all(pipeline) and strength is not None else 1.0
        _check_most_steps(steps, int(most * part), part)
    if strength is not None and not _runs_all(pipeline):
        _check_steps_left(steps, strength)


def _check_most_steps(steps: int, most: int, strength: float) -> None:
    """A consistency model's steps are some of those that it was distilled on."""
    if steps <= most:
        return
    where = "" if strength == 1 else f" at --strength {strength:g}"
    fix = f"use --steps {most} or fewer" if most else "use more --strength"
    raise SpecError(
        f"--steps {steps} is more than the {most} that this model's scheduler has{where}: {fix}."
    )


def _check_steps_left(steps: int, strength: float) -> None:
    """diffusers runs int(steps * strength) of them; SpecError where that is none."""
    if int(steps * strength) >= 1:
        return
    least = math.ceil(100 / steps) / 100
    if int(steps * least) < 1:
        least += 0.01
    raise SpecError(
        f"--strength {strength:g} of {steps} steps runs none, so nothing would change: use "
        f"--strength {least:.2f} or more, or more --steps."
    )


def _notes(pipeline: Any, request: Request, settings: dict[str, Any]) -> list[str]:
    """Sentences on what the request's numbers mean for this model."""
    steps = settings["num_inference_steps"]
    said = []
    if request.steps is None and steps > pipeline.kiln.manifest.defaults.get("steps", steps):
        said.append(f"{steps} steps are planned, so that one runs at this strength.")
    if request.negative_prompt and not _guides(pipeline, settings):
        said.append(
            "The negative prompt has no effect: it needs guidance of more than 1, in a model that "
            "compares with one."
        )
    return said


def _guides(pipeline: Any, settings: dict[str, Any]) -> bool:
    """Whether a step compares what the prompt gives with what the negative prompt gives."""
    if "negative_prompt" not in _parameters(pipeline):
        return False
    unet = getattr(pipeline, "unet", None)
    if unet is not None and unet.config.time_cond_proj_dim is not None:
        return False
    return bool(settings["guidance_scale"] > 1)


def _facts(pipeline: Any, request: Request, settings: dict[str, Any]) -> dict[str, Any]:
    """All that the picture depends on, except its seed and the drawing's files."""
    manifest = pipeline.kiln.manifest
    facts = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "steps": settings["num_inference_steps"],
        "guidance": settings.get("guidance_scale"),
        "scheduler": type(pipeline.scheduler).__name__,
        "model": manifest.model.name,
        "model_digest": manifest.model.digest,
        "bundle": manifest.key,
        "kiln": manifest.kiln,
    }
    if "strength" in settings:
        facts["strength"] = settings["strength"]
    if request.clip_skip is not None:
        facts["clip_skip"] = request.clip_skip
    return facts
