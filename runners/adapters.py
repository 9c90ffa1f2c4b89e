"""Engines in the place of a diffusers pipeline's modules, one thin adapter per role.

An adapter has what the pipelines read of a module (config, dtype, device, one parameter) and calls
an engine; everything else (schedulers, guidance, callbacks, img2img) stays diffusers' own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from transformers import CLIPTextConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from profiles.errors import UnsupportedError
from runners.engines.base import DeviceEngine, Engine

__all__ = ["DenoiserAdapter", "TextEncoderAdapter", "VaeAdapter"]

OpenEngine = Callable[[], Engine]


class _Adapter(nn.Module):
    """The module-shaped surface that all roles share; numbers enter and leave as float32."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.anchor = nn.Parameter(torch.zeros(0), requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs and outputs; what the engine computes in is the manifest's."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs live."""
        return self.anchor.device


def _run(engine: Engine, **feeds: Tensor) -> list[Tensor]:
    """Call the engine with the signature's dtypes; outputs in the signature's order."""
    if isinstance(engine, DeviceEngine):
        types = {spec.name: getattr(torch, spec.dtype) for spec in engine.signature.inputs}
        given = {name: x.detach().to("cuda", types[name]) for name, x in feeds.items()}
        found = engine.on_device(given)
        return [found[spec.name] for spec in engine.signature.outputs]
    specs = {spec.name: np.dtype(spec.dtype) for spec in engine.signature.inputs}
    arrays = {
        name: tensor.detach().cpu().numpy().astype(specs[name], copy=False)
        for name, tensor in feeds.items()
    }
    outputs = engine(arrays)
    return [torch.from_numpy(outputs[spec.name]) for spec in engine.signature.outputs]


class TextEncoderAdapter(_Adapter):
    """Stands for a CLIPTextModel."""

    def __init__(self, config: dict[str, Any], engine: OpenEngine) -> None:
        """Take the text encoder's config and a function that opens its engine once."""
        super().__init__(CLIPTextConfig.from_dict(config))
        self._engine = engine
        # diffusers 0.42's clip_skip norms the state that it takes; the engine's are normed already
        self.text_model = nn.ModuleDict({"final_layer_norm": nn.Identity()})

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,  # noqa: FBT001 (transformers' signature)
        return_dict: bool | None = None,  # noqa: FBT001, ARG002 (transformers' signature)
    ) -> BaseModelOutputWithPooling:
        """Encode [batch, tokens] ids.

        Raises UnsupportedError for what the engine has no input or output for.
        """
        if attention_mask is not None:
            raise UnsupportedError("The text encoder's engine takes no attention mask.")
        last, pooled, *others = _run(self._engine(), input_ids=input_ids)
        states = None
        if output_hidden_states:
            if not others:
                raise UnsupportedError(
                    "The text encoder's engine gives the last hidden state only: compile the model "
                    "again with this version of kiln."
                )
            states = others[0].unbind(1)
        return BaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=pooled, hidden_states=states
        )


class DenoiserAdapter(_Adapter):
    """Stands for a UNet2DConditionModel."""

    def __init__(self, config: dict[str, Any], engine: OpenEngine) -> None:
        """Take the UNet's config and a function that opens its engine once."""
        super().__init__(FrozenDict(config))
        self._engine = engine

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = True,  # noqa: FBT001, FBT002 (diffusers' signature)
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """One step's raw prediction, shaped as `sample` [batch, channels, height, width].

        Raises UnsupportedError for inputs that the engine doesn't have.
        """
        extra = {
            "timestep_cond": timestep_cond,
            "cross_attention_kwargs": cross_attention_kwargs or None,
            "added_cond_kwargs": added_cond_kwargs or None,
        }
        given = [name for name, value in extra.items() if value is not None]
        if given:
            raise UnsupportedError(f"The denoiser's engine has no input for {', '.join(given)}.")
        steps = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)
        (out,) = _run(
            self._engine(),
            sample=sample,
            timestep=steps.expand(sample.shape[0]),
            encoder_hidden_states=encoder_hidden_states,
        )
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)


class VaeAdapter(_Adapter):
    """Stands for an AutoencoderKL; its halves are two engines."""

    def __init__(self, config: dict[str, Any], *, encoder: OpenEngine, decoder: OpenEngine) -> None:
        """Take the VAE's config and functions that open its engines once."""
        super().__init__(FrozenDict(config))
        self._encoder, self._decoder = encoder, decoder

    def encode(
        self,
        x: Tensor,
        return_dict: bool = True,  # noqa: FBT001, FBT002 (diffusers' signature)
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Images in -1..1 [batch, 3, height, width] -> the latents' distribution."""
        (moments,) = _run(self._encoder(), image=x)
        distribution = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,  # noqa: FBT001, FBT002 (diffusers' signature)
        generator: torch.Generator | None = None,  # noqa: ARG002 (diffusers' signature)
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents already divided by scaling_factor -> images in -1..1."""
        (image,) = _run(self._decoder(), latent=z)
        return DecoderOutput(sample=image) if return_dict else (image,)
