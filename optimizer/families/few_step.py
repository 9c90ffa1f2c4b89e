"""Latent-diffusion UNets that were distilled to few steps: LCM, Turbo, Lightning, Hyper-SD.

Their weights have the names and shapes of the model that they were made from, so a file alone
doesn't say what it is; a folder does where its scheduler or its UNet is a consistency model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from optimizer.families.base import FewStep

__all__ = ["FEW_STEP", "unet_few_step"]

_TRAILING = {"timestep_spacing": "trailing"}
_UNCLIPPED = {"clip_sample": False, "set_alpha_to_one": False}
"""As in the schedulers of Stable Diffusion's own repositories; these classes' defaults differ."""

FEW_STEP = {
    "hyper": FewStep(8, 0.0, {"_class_name": "DDIMScheduler", **_TRAILING, **_UNCLIPPED}),
    "lcm": FewStep(4, 0.0, {"_class_name": "LCMScheduler", **_UNCLIPPED}),
    "lightning": FewStep(4, 0.0, {"_class_name": "EulerDiscreteScheduler", **_TRAILING}),
    "turbo": FewStep(4, 0.0, {"_class_name": "EulerAncestralDiscreteScheduler", **_TRAILING}),
}
"""Sources, the models' cards on the hub: ByteDance/Hyper-SD (checkpoints of 1 to 8 steps, those of
a fixed number by DDIM, trailing, guidance 0); latent-consistency/lcm-lora-sdxl and -sdv1-5 (2 to
8 steps, guidance off or 1 to 2); ByteDance/SDXL-Lightning (a checkpoint each for 2, 4 and 8 steps,
Euler, trailing, guidance 0); stabilityai/sdxl-turbo and sd-turbo (1 to 4 steps, guidance 0, the
repository's scheduler)."""

_EMBEDDED_GUIDANCE = 8.0
"""Where the UNet takes guidance as an input: the cards of SimianLuo/LCM_Dreamshaper_v7 and
latent-consistency/lcm-sdxl."""

_MADE_FOR = {"LCMScheduler": "lcm", "TCDScheduler": "hyper"}
"""A scheduler that only models of few steps are drawn with -> their kind."""


def unet_few_step(configs: Mapping[str, Mapping[str, Any]], kind: str | None) -> FewStep | None:
    """How a UNet of few steps is drawn with; KeyError for a `kind` that isn't known.

    Without one, an LCM is told by its UNet's input for guidance, and any by its scheduler, which
    then stays as it is.
    """
    embeds = configs["unet"].get("time_cond_proj_dim") is not None
    told = kind or _MADE_FOR.get(str(configs["scheduler"].get("_class_name")))
    if told is None and not embeds:
        return None
    found = FEW_STEP[told or "lcm"]
    if kind is None:
        found = replace(found, scheduler={})
    return replace(found, guidance=_EMBEDDED_GUIDANCE) if embeds else found
