"""The calling conventions of control networks, and of UNets that take what they give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from runners.unets import unet_wrapper

__all__ = ["ControlNet", "ControlledUNet", "cells_of"]


def cells_of(image: Tensor, factor: int) -> Tensor:
    """[batch, channels, height, width] -> [batch, channels * factor², height / factor, width /
    factor]: the pixels that lie under each latent.

    So an engine's signature ties the control image's sides to the latents'.
    """
    return functional.pixel_unshuffle(image, factor)


class ControlNet(nn.Module):
    """sample, time_features [batch, width], encoder_hidden_states, controlnet_cells [batch,
    3 * factor², height, width] in 0..1, conditioning_scale [1] [, text_embeds, size_features] ->
    a residual for every skip of the UNet, the outermost first, then that of its middle.
    """

    def __init__(self, module: nn.Module) -> None:
        """Wrap a diffusers ControlNetModel."""
        super().__init__()
        self.module = module
        config: Any = module.config
        self._factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
        self._flipped = config["controlnet_conditioning_channel_order"] == "bgr"

    def forward(
        self,
        sample: Tensor,
        time_features: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cells: Tensor,
        conditioning_scale: Tensor,
        text_embeds: Tensor | None = None,
        size_features: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """One step's residuals; what ControlNetModel.forward does, but with given features."""
        module: Any = self.module
        embedded = module.time_embedding(time_features)
        if text_embeds is not None and size_features is not None:
            added = torch.cat((text_embeds, size_features), dim=-1)
            embedded = embedded + module.add_embedding(added)
        image = functional.pixel_shuffle(controlnet_cells, self._factor)
        if self._flipped:
            image = image.flip(1)
        hidden = module.conv_in(sample) + module.controlnet_cond_embedding(image)
        skips = [hidden]
        for block in module.down_blocks:
            states = _states(block, encoder_hidden_states)
            hidden, found = block(hidden_states=hidden, temb=embedded, **states)
            skips += found
        states = _states(module.mid_block, encoder_hidden_states)
        hidden = module.mid_block(hidden, embedded, **states)
        ends = zip(module.controlnet_down_blocks, skips, strict=True)
        given = [*(end(skip) for end, skip in ends), module.controlnet_mid_block(hidden)]
        return tuple(residual * conditioning_scale for residual in given)


def _states(block: nn.Module, states: Tensor) -> dict[str, Tensor]:
    """What a block takes of the text: nothing, where it has no cross-attention."""
    return {"encoder_hidden_states": states} if getattr(block, "has_cross_attention", False) else {}


class ControlledUNet(nn.Module):
    """What the UNet's own wrapper takes, then a residual for every skip and the middle's -> the raw
    prediction.
    """

    def __init__(self, module: nn.Module) -> None:
        """Wrap a UNet2DConditionModel."""
        super().__init__()
        self.plain = unet_wrapper(module)
        blocks: Any = module.down_blocks
        self._count = 2 + sum(
            len(block.resnets) + (block.downsamplers is not None) for block in blocks
        )
        self._given: tuple[Tensor, ...] = ()

    def _add(self, _module: nn.Module, args: Any, keywords: dict[str, Any]) -> tuple[Any, Any]:
        *down, mid = self._given
        more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return args, {**keywords, **more}

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        """One step's prediction, before guidance."""
        self._given = inputs[-self._count :]
        unet: Any = self.plain.module
        hook = unet.register_forward_pre_hook(self._add, with_kwargs=True)
        try:
            found: tuple[Tensor] = self.plain(*inputs[: -self._count])
        finally:
            hook.remove()
        return found
