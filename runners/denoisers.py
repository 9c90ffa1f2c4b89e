"""Denoisers' engines in the place of diffusers' modules, and what the engines are fed.

A pipeline calls its denoiser as diffusers' class wants it; `FEEDS` turns such a call into the
inputs of the engine's signature, for the adapters here and for whoever records calls. Sines and
cosines of timesteps, sizes and places are computed here, in fp32: an engine that computes in bf16
reads 951 as 952 (2 dB of the reference model's noise in bf16, and 18 of a small FLUX's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from profiles.errors import UnsupportedError
from runners.adapters import Adapter, OpenEngine, run, with_defaults
from runners.control_tasks import CONTROL

__all__ = [
    "DENOISERS",
    "FEEDS",
    "FluxAdapter",
    "Sd3Adapter",
    "TimestepUNetAdapter",
    "UNetAdapter",
]

Given = Mapping[str, Any]


def _timestep_feeds(config: Given, given: Given) -> dict[str, Any]:  # noqa: ARG001
    """One timestep for each, as a number."""
    steps = torch.as_tensor(given["timestep"], dtype=torch.float32).reshape(-1)
    return {**given, "timestep": steps.expand(len(given["sample"]))}


def _unet_feeds(config: Given, given: Given) -> dict[str, Any]:
    width = int(config.get("block_out_channels", (320,))[0])
    feeds = {**_timestep_feeds(config, given), **(given.get("added_cond_kwargs") or {})}
    feeds.pop("added_cond_kwargs", None)
    feeds["time_features"] = _unet_waves(config, feeds.pop("timestep"), width)
    if (sizes := feeds.pop("time_ids", None)) is not None:
        waves = _unet_waves(config, sizes.flatten(), int(config["addition_time_embed_dim"]))
        feeds["size_features"] = waves.reshape(len(sizes), -1)
    return feeds


def _unet_waves(config: Given, numbers: Tensor, width: int) -> Tensor:
    """[numbers] -> [numbers, width]; the defaults are UNet2DConditionModel's."""
    flip, shift = bool(config.get("flip_sin_to_cos", True)), float(config.get("freq_shift", 0))
    waves: Tensor = get_timestep_embedding(
        numbers.float(), width, flip_sin_to_cos=flip, downscale_freq_shift=shift
    )
    return waves


_WAVES = 256
"""Of diffusers' CombinedTimestepTextProjEmbeddings."""


def _transformer_waves(numbers: Tensor) -> Tensor:
    waves: Tensor = get_timestep_embedding(
        numbers.float(), _WAVES, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    return waves


def _sd3_feeds(config: Given, given: Given) -> dict[str, Any]:  # noqa: ARG001
    feeds = dict(given)
    feeds["time_features"] = _transformer_waves(feeds.pop("timestep"))
    return feeds


_FLUX_THETA, _FLUX_AXES, _FLUX_STEPS = 10000, (16, 56, 56), 1000
"""Of the rotary embedding, and steps for a timestep of 1, in diffusers' FluxTransformer2DModel."""


def _flux_feeds(config: Given, given: Given) -> dict[str, Any]:
    axes = list(config.get("axes_dims_rope", _FLUX_AXES))
    embed = FluxPosEmbed(theta=_FLUX_THETA, axes_dim=axes)
    feeds = dict(given)
    feeds["time_features"] = _transformer_waves(_FLUX_STEPS * feeds.pop("timestep"))
    if (guidance := feeds.pop("guidance", None)) is not None:
        feeds["guidance_features"] = _transformer_waves(_FLUX_STEPS * guidance)
    for kind in ("img", "txt"):
        feeds[f"{kind}_rope"] = torch.cat(embed(feeds.pop(f"{kind}_ids")), -1).float()
    return feeds


FEEDS: dict[str, Callable[[Given, Given], dict[str, Any]]] = {
    "unet": _unet_feeds,
    "unet_timestep": _timestep_feeds,
    "sd3_transformer": _sd3_feeds,
    "flux_transformer": _flux_feeds,
}
"""A denoiser's wrapper -> (its config, what a pipeline gives the module) -> the engine's inputs."""


class _DenoiserAdapter(Adapter):
    """What all denoisers share: the engine's inputs by name, everything else refused."""

    wrapper: str

    def __init__(self, config: dict[str, Any], engine: OpenEngine) -> None:
        """Take the denoiser's config and a function that opens its engine, or the form that it is
        called with, once.
        """
        super().__init__(with_defaults(config))
        self._engine = engine

    def _denoised(self, given: Given, form: str = "") -> Tensor:
        """The prediction of the engine, or of a form of it; UnsupportedError for inputs that it
        doesn't have.
        """
        engine = self.opened(self._engine, form)
        names = [spec.name for spec in engine.signature.inputs]
        there = {name: value for name, value in given.items() if value is not None}
        feeds = FEEDS[self.wrapper](self.config, there)
        if extra := [name for name in feeds if name not in names]:
            raise UnsupportedError(f"The denoiser's engine has no input for {', '.join(extra)}.")
        (out,) = run(engine, **feeds)
        return out


class UNetAdapter(_DenoiserAdapter):
    """Stands for a UNet2DConditionModel."""

    wrapper = "unet"

    def __init__(self, config: dict[str, Any], engine: OpenEngine) -> None:
        """Take the UNet's config, in which pipelines look for an input for guidance."""
        super().__init__({"time_cond_proj_dim": None, **config}, engine)

    @property
    def add_embedding(self) -> SimpleNamespace:
        """Whose width SDXL's pipelines compare with what they give."""
        width = self.config["projection_class_embeddings_input_dim"]
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        return_dict: bool = True,  # noqa: FBT001, FBT002 (diffusers' signature)
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """One step's raw prediction, shaped as `sample` [batch, channels, height, width].

        Raises UnsupportedError for inputs that the engine doesn't have.
        """
        residuals = dict(enumerate(down_block_additional_residuals or ()))
        out = self._denoised(
            {
                **{f"down_residual_{i}": residual for i, residual in residuals.items()},
                "mid_residual": mid_block_additional_residual,
                "sample": sample,
                "timestep": timestep,
                "encoder_hidden_states": encoder_hidden_states,
                "timestep_cond": timestep_cond,
                "cross_attention_kwargs": cross_attention_kwargs or None,
                "added_cond_kwargs": added_cond_kwargs,
            },
            CONTROL if residuals else "",
        )
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)


class TimestepUNetAdapter(UNetAdapter):
    """Stands for a UNet2DConditionModel that optimum exported."""

    wrapper = "unet_timestep"


class Sd3Adapter(_DenoiserAdapter):
    """Stands for an SD3Transformer2DModel."""

    wrapper = "sd3_transformer"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
        skip_layers: list[int] | None = None,
        return_dict: bool = True,  # noqa: FBT001, FBT002 (diffusers' signature)
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """One step's raw prediction, shaped as `hidden_states` [batch, channels, height, width].

        Raises UnsupportedError for inputs that the engine doesn't have.
        """
        out = self._denoised(
            {
                "hidden_states": hidden_states,
                "encoder_hidden_states": encoder_hidden_states,
                "pooled_projections": pooled_projections,
                "timestep": timestep,
                "joint_attention_kwargs": joint_attention_kwargs or None,
                "skip_layers": skip_layers,
            }
        )
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


class FluxAdapter(_DenoiserAdapter):
    """Stands for a FluxTransformer2DModel."""

    wrapper = "flux_transformer"

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:  # noqa: ARG002 (diffusers' signature)
        """Nothing is cached between steps."""
        yield

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,  # noqa: FBT001, FBT002 (diffusers' signature)
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """One step's raw prediction, shaped as `hidden_states` [batch, sequence, channels].

        Raises UnsupportedError for inputs that the engine doesn't have.
        """
        out = self._denoised(
            {
                "hidden_states": hidden_states,
                "encoder_hidden_states": encoder_hidden_states,
                "pooled_projections": pooled_projections,
                "timestep": timestep,
                "img_ids": img_ids,
                "txt_ids": txt_ids,
                "guidance": guidance,
                "joint_attention_kwargs": joint_attention_kwargs or None,
            }
        )
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


DENOISERS = {
    cls.wrapper: cls for cls in (UNetAdapter, TimestepUNetAdapter, Sd3Adapter, FluxAdapter)
}
"""A denoiser's wrapper -> what stands for it in a pipeline."""
