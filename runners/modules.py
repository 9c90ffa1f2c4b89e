"""The torch side of a component: built from its config, called with positional tensors.

A wrapper per role gives every component one calling convention: the signature's inputs in order,
a tuple of its outputs back. Exporters trace the wrappers; the eager engine runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from profiles.errors import SpecError

__all__ = ["WRAPPERS", "component_class", "component_from_config"]

_CLASSES = {
    "AutoencoderKL": "diffusers",
    "CLIPTextModel": "transformers",
    "CLIPTextModelWithProjection": "transformers",
    "FluxTransformer2DModel": "diffusers",
    "SD3Transformer2DModel": "diffusers",
    "T5EncoderModel": "transformers",
    "UNet2DConditionModel": "diffusers",
}
"""The classes that a config may name: a config is data from outside and never picks freely."""


def component_class(config: Mapping[str, Any]) -> Any:
    """The diffusers or transformers class that `config` names.

    Raises SpecError where kiln doesn't know it.
    """
    name = str(config.get("_class_name") or (config.get("architectures") or ["?"])[0])
    if name not in _CLASSES:
        raise SpecError(f"The config names the class {name}; kiln knows {sorted(_CLASSES)}.")
    return getattr(import_module(_CLASSES[name]), name)


def component_from_config(config: Mapping[str, Any]) -> nn.Module:
    """The module that `config` describes, weights not initialised (meta device)."""
    cls = component_class(config)
    with torch.device("meta"):
        if hasattr(cls, "load_config"):
            module: nn.Module = cls.from_config(dict(config))
        else:
            module = cls(cls.config_class.from_dict(dict(config)))
    return module.eval()


class TextEncoder(nn.Module):
    """input_ids [batch, tokens] -> last_hidden_state [batch, tokens, width], pooler_output."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap a CLIPTextModel."""
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode padded prompts; the positions are explicit, as batched exports need them."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        output = self.module(
            input_ids=input_ids, position_ids=positions.expand(input_ids.shape[0], -1)
        )
        return output.last_hidden_state, output.pooler_output


class Denoiser(nn.Module):
    """sample, timestep [batch], encoder_hidden_states -> the raw prediction, shaped as sample."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap a UNet2DConditionModel."""
        super().__init__()
        self.module = module

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor]:
        """One step's prediction, before guidance."""
        output = self.module(sample, timestep, encoder_hidden_states, return_dict=False)
        return (output[0],)


class VaeDecoder(nn.Module):
    """latent [batch, channels, h, w] (already divided by scaling_factor) -> image in -1..1."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap an AutoencoderKL and drop its encoding half."""
        super().__init__()
        for name in ("encoder", "quant_conv"):
            setattr(module, name, None)
        self.module = module

    def forward(self, latent: Tensor) -> tuple[Tensor]:
        """Decode."""
        if self.module.post_quant_conv is not None:
            latent = self.module.post_quant_conv(latent)  # type: ignore[operator]
        return (self.module.decoder(latent),)  # type: ignore[operator]


class VaeEncoder(nn.Module):
    """image in -1..1 -> moments [batch, 2*channels, h, w]: mean and log-variance."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap an AutoencoderKL and drop its decoding half."""
        super().__init__()
        for name in ("decoder", "post_quant_conv"):
            setattr(module, name, None)
        self.module = module

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """Encode; sampling stays with the caller, so the graph holds no random numbers."""
        moments = self.module.encoder(image)  # type: ignore[operator]
        if self.module.quant_conv is not None:
            moments = self.module.quant_conv(moments)  # type: ignore[operator]
        return (moments,)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "text_encoder": TextEncoder,
    "denoiser": Denoiser,
    "vae_decoder": VaeDecoder,
    "vae_encoder": VaeEncoder,
}
"""Role -> the wrapper that gives the role its calling convention."""
