"""UNets' calling conventions: the wrappers that runners.modules names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["GuidedUNet", "TimestepUNet", "UNet", "unet_wrapper"]


class UNet(nn.Module):
    """sample, time_features [batch, width], encoder_hidden_states [, text_embeds, size_features
    [batch, width]] -> the raw prediction, [batch, channels, height, width].

    Features are the sines and cosines of the timestep and of SDXL's sizes.
    """

    def __init__(self, module: nn.Module) -> None:
        """Wrap a UNet2DConditionModel; it takes features instead of numbers."""
        super().__init__()
        self.module = _taking_features(module)

    def forward(
        self,
        sample: Tensor,
        time_features: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        size_features: Tensor | None = None,
    ) -> tuple[Tensor]:
        """One step's prediction, before guidance."""
        output = self.module(
            sample,
            time_features,
            encoder_hidden_states,
            added_cond_kwargs=_added(text_embeds, size_features),
            return_dict=False,
        )
        return (output[0],)


class GuidedUNet(nn.Module):
    """sample, time_features, timestep_cond [batch, width], encoder_hidden_states [, text_embeds,
    size_features] -> the raw prediction: `UNet` for one that takes guidance as an input (LCM).

    `timestep_cond` holds the sines and cosines of the guidance scale.
    """

    def __init__(self, module: nn.Module) -> None:
        """Wrap a UNet2DConditionModel whose config has time_cond_proj_dim."""
        super().__init__()
        self.module = _taking_features(module)

    def forward(
        self,
        sample: Tensor,
        time_features: Tensor,
        timestep_cond: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        size_features: Tensor | None = None,
    ) -> tuple[Tensor]:
        """One step's prediction."""
        output = self.module(
            sample,
            time_features,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs=_added(text_embeds, size_features),
            return_dict=False,
        )
        return (output[0],)


def unet_wrapper(module: nn.Module) -> nn.Module:
    """The wrapper that a UNet2DConditionModel's inputs ask for."""
    guided = module.config.get("time_cond_proj_dim") is not None  # type: ignore[operator, union-attr]
    return GuidedUNet(module) if guided else UNet(module)


def _taking_features(module: nn.Module) -> nn.Module:
    """The UNet, taking features in the place of numbers."""
    module.get_time_embed = _given_features  # type: ignore[assignment]
    if hasattr(module, "add_time_proj"):
        module.add_time_proj = nn.Identity()
    return module


def _added(text_embeds: Tensor | None, size_features: Tensor | None) -> dict[str, Any] | None:
    """What SDXL's UNet takes beside the text."""
    return None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": size_features}


def _given_features(sample: Tensor, timestep: Tensor) -> Tensor:
    """In the place of UNet2DConditionModel.get_time_embed."""
    return timestep.to(sample.dtype)


class TimestepUNet(nn.Module):
    """sample, timestep [batch], [timestep_cond,] encoder_hidden_states -> the raw prediction,
    shaped as sample.
    """

    def __init__(self, module: nn.Module) -> None:
        """Wrap what stands for a UNet2DConditionModel that optimum exported."""
        super().__init__()
        self.module = module

    def forward(self, sample: Tensor, timestep: Tensor, *others: Tensor) -> tuple[Tensor]:
        """One step's prediction, before guidance; `others` as above."""
        *guidance, states = others
        given = {"timestep_cond": guidance[0]} if guidance else {}
        output = self.module(sample, timestep, states, **given, return_dict=False)
        return (output[0],)
