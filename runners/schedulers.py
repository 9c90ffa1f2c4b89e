"""Schedulers by the names that people use; the classes are diffusers' own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from profiles.errors import SpecError

__all__ = ["SCHEDULERS", "spreads_steps", "with_scheduler"]

_LATENT = {"clip_sample": False}
"""Latents aren't pixels in -1..1, which these classes cut their samples to by default."""
_TRAILING = {"timestep_spacing": "trailing"}

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", _LATENT),
    "ddim_trailing": ("DDIMScheduler", {**_LATENT, **_TRAILING}),
    "ddpm": ("DDPMScheduler", _LATENT),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "euler_trailing": ("EulerDiscreteScheduler", _TRAILING),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Name -> diffusers' class and the settings that the name means."""


def with_scheduler(pipeline: Any, name: str) -> None:
    """Give the pipeline another scheduler, made from the model's own scheduler config: where steps
    lie (a few-step model's `timestep_spacing`) stays, unless the name says otherwise.

    Raises SpecError for an unknown name, and for one that the pipeline's class can't use.
    """
    if name not in SCHEDULERS:
        raise SpecError(
            f"--scheduler {name} is not known: use one of {', '.join(sorted(SCHEDULERS))}."
        )
    import diffusers

    cls, settings = SCHEDULERS[name]
    scheduler = getattr(diffusers, cls).from_config(pipeline.scheduler.config, **settings)
    if spreads_steps(type(pipeline).__call__) and not spreads_steps(scheduler.set_timesteps):
        raise SpecError(
            f"--scheduler {name} can't be used with this bundle's {type(pipeline).__name__}: leave "
            "it out, or use --scheduler lcm."
        )
    pipeline.scheduler = scheduler


def spreads_steps(function: Callable[..., Any]) -> bool:
    """Whether a pipeline's call or a scheduler's set_timesteps is a consistency model's, which runs
    some of the steps that it was distilled on.
    """
    return "original_inference_steps" in inspect.signature(function).parameters
