"""Engines in the place of a diffusers pipeline's modules, one thin adapter per role.

An adapter has what the pipelines read of a module (config, dtype, device, one parameter) and calls
an engine; everything else (schedulers, guidance, callbacks, img2img) stays diffusers' own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput, Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from transformers import CLIPTextConfig, T5Config
from transformers.utils import ModelOutput

from profiles.errors import UnsupportedError
from runners.engines.base import DeviceEngine, Engine

__all__ = [
    "ADAPTERS",
    "TextEncoderAdapter",
    "TransformerAdapter",
    "UNetAdapter",
    "VaeAdapter",
    "unet_feeds",
]

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
    """Stands for a text encoder of transformers: CLIP, with a projection or without, or T5."""

    def __init__(self, config: dict[str, Any], engine: OpenEngine) -> None:
        """Take the text encoder's config and a function that opens its engine once."""
        kind = T5Config if config.get("model_type") == "t5" else CLIPTextConfig
        super().__init__(kind.from_dict(config))
        self._engine = engine
        # where diffusers norms an earlier layer's states: these engines give normed ones
        self.text_model = SimpleNamespace(final_layer_norm=nn.Identity())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,  # noqa: FBT001 (transformers' signature)
        return_dict: bool | None = None,  # noqa: FBT001, ARG002 (transformers' signature)
    ) -> ModelOutput:
        """Encode [batch, tokens] ids; what comes back is what transformers' class gives.

        Raises UnsupportedError for what the engine has no input or output for.
        """
        if attention_mask is not None:
            raise UnsupportedError("The text encoder's engine takes no attention mask.")
        engine = self._engine()
        names = [spec.name for spec in engine.signature.outputs]
        found: dict[str, Any] = dict(zip(names, _run(engine, input_ids=input_ids), strict=True))
        states = found.pop("hidden_states", None)
        if output_hidden_states:
            if states is None:
                raise UnsupportedError("The text encoder's engine gives no hidden states.")
            found["hidden_states"] = states.unbind(1)
        return _TextOutput(**found)


@dataclass
class _TextOutput(ModelOutput):  # type: ignore[misc]
    """Tensors by name and, as transformers' own, by place: those that are there, in this order."""

    text_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class _DenoiserAdapter(_Adapter):
    """What all denoisers share: the engine's inputs by name, everything else refused."""

    def __init__(self, config: dict[str, Any], engine: OpenEngine) -> None:
        """Take the denoiser's config and a function that opens its engine once."""
        super().__init__(FrozenDict(config))
        self._engine = engine

    def _denoised(self, given: Mapping[str, Any]) -> Tensor:
        """The engine's prediction; UnsupportedError for inputs that it doesn't have."""
        engine = self._engine()
        names = [spec.name for spec in engine.signature.inputs]
        feeds = {name: value for name, value in given.items() if value is not None}
        if extra := [name for name in feeds if name not in names]:
            raise UnsupportedError(f"The denoiser's engine has no input for {', '.join(extra)}.")
        (out,) = _run(engine, **feeds)
        return out


class UNetAdapter(_DenoiserAdapter):
    """Stands for a UNet2DConditionModel."""

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
        return_dict: bool = True,  # noqa: FBT001, FBT002 (diffusers' signature)
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """One step's raw prediction, shaped as `sample` [batch, channels, height, width].

        Raises UnsupportedError for inputs that the engine doesn't have.
        """
        feeds = unet_feeds(sample, timestep, encoder_hidden_states, added_cond_kwargs)
        more = {
            "timestep_cond": timestep_cond,
            "cross_attention_kwargs": cross_attention_kwargs or None,
        }
        out = self._denoised({**feeds, **more})
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)


class TransformerAdapter(_DenoiserAdapter):
    """Stands for an SD3Transformer2DModel or a FluxTransformer2DModel."""

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
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        skip_layers: list[int] | None = None,
        return_dict: bool = True,  # noqa: FBT001, FBT002 (diffusers' signature)
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """One step's raw prediction, shaped as `hidden_states`.

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
                "skip_layers": skip_layers,
            }
        )
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


def unet_feeds(
    sample: Tensor,
    timestep: Tensor | float,
    encoder_hidden_states: Tensor,
    added_cond_kwargs: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The inputs of a UNet's engine, from what a pipeline gives the module."""
    steps = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)
    return {
        "sample": sample,
        "timestep": steps.expand(sample.shape[0]),
        "encoder_hidden_states": encoder_hidden_states,
        **(added_cond_kwargs or {}),
    }


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


ADAPTERS: dict[str, Callable[[dict[str, Any], OpenEngine], nn.Module]] = {
    "clip_text": TextEncoderAdapter,
    "clip_hidden": TextEncoderAdapter,
    "t5_text": TextEncoderAdapter,
    "unet": UNetAdapter,
    "transformer": TransformerAdapter,
}
"""A component's wrapper -> what stands for it in a pipeline; the VAE's halves have `VaeAdapter`."""
