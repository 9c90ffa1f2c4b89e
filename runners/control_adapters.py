"""Control networks' engines in the place of diffusers' ControlNetModel."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from torch import Tensor, nn

from profiles.errors import UnsupportedError
from runners.adapters import OpenEngine, run, with_defaults
from runners.controls import cells_of
from runners.denoisers import FEEDS

__all__ = ["ControlNetAdapter"]


class ControlNetAdapter(ControlNetModel):  # type: ignore[misc]
    """Stands for a ControlNetModel, which pipelines ask for by class; it has none of its layers."""

    def __init__(self, config: dict[str, Any], engine: OpenEngine) -> None:
        """Take the network's config and a function that opens its engine once."""
        nn.Module.__init__(self)
        self._internal_dict = with_defaults(config)
        self._engine = engine
        self.anchor = nn.Parameter(torch.zeros(0), requires_grad=False)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,  # noqa: ARG002 (the class doesn't use it either)
        attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,  # noqa: FBT001, FBT002 (diffusers' signature)
        return_dict: bool = True,  # noqa: FBT001, FBT002 (diffusers' signature)
    ) -> ControlNetOutput | tuple[tuple[Tensor, ...], Tensor]:
        """The residuals of one step, `controlnet_cond` [batch, 3, height, width] being in 0..1.

        Raises UnsupportedError for inputs that the engine doesn't have.
        """
        others = (class_labels, attention_mask, cross_attention_kwargs or None)
        if any(other is not None for other in others):
            raise UnsupportedError(
                "A control network's engine takes no class_labels, attention_mask or "
                "cross_attention_kwargs."
            )
        factor = 2 ** (len(self.config["conditioning_embedding_out_channels"]) - 1)
        given = {
            "sample": sample,
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
            "added_cond_kwargs": added_cond_kwargs,
            "controlnet_cells": cells_of(controlnet_cond, factor),
            "conditioning_scale": torch.tensor([float(conditioning_scale)]),
        }
        *down, mid = run(self._engine(), **FEEDS["unet"](self.config, given))
        if guess_mode:
            *down, mid = _weaker_outside([*down, mid])
        if return_dict:
            return ControlNetOutput(down_block_res_samples=tuple(down), mid_block_res_sample=mid)
        return tuple(down), mid


def _weaker_outside(residuals: list[Tensor]) -> list[Tensor]:
    """Guess mode: from a tenth at the outermost skip to all in the middle, in equal ratios."""
    return [x * s for x, s in zip(residuals, torch.logspace(-1, 0, len(residuals)), strict=True)]
