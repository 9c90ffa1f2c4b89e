"""The torch side of a component: built from its config, called with positional tensors.

A wrapper gives a component one calling convention: the signature's inputs in order, a tuple of its
outputs back. Exporters trace the wrappers; the eager engine runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from profiles.errors import SpecError
from runners.controls import ControlledUNet, ControlNet
from runners.unets import TimestepUNet, unet_wrapper
from runners.vae_parts import DecoderAfter, DecoderBefore, EncoderAfter, EncoderBefore

__all__ = ["WRAPPERS", "component_class", "component_from_config"]

_CLASSES = {
    "AutoencoderKL": "diffusers",
    "AutoencoderTiny": "diffusers",
    "CLIPTextModel": "transformers",
    "CLIPTextModelWithProjection": "transformers",
    "ControlNetModel": "diffusers",
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


class ClipText(nn.Module):
    """input_ids [batch, tokens] -> last_hidden_state [batch, tokens, width], pooler_output
    [batch, width] and hidden_states [batch, layers + 1, tokens, width], each one normed.

    Normed, because that is how Stable Diffusion 1.x and 2.x use an earlier layer's (clip skip).
    """

    def __init__(self, module: nn.Module) -> None:
        """Wrap a CLIPTextModel."""
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode padded prompts."""
        output = _clip(self.module, input_ids)
        states = self.module.final_layer_norm(torch.stack(output.hidden_states, 1))  # type: ignore[operator]
        return output.last_hidden_state, output.pooler_output, states


class ClipPlain(nn.Module):
    """input_ids [batch, tokens] -> last_hidden_state [batch, tokens, width], pooler_output."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap what stands for a CLIPTextModel that optimum exported."""
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode padded prompts."""
        output = self.module(input_ids)
        return output.last_hidden_state, output.pooler_output


class ClipHidden(nn.Module):
    """input_ids [batch, tokens] -> hidden_states [batch, layers + 1, tokens, width] as they are,
    last_hidden_state [batch, tokens, width] and pooled [batch, width]: the projected one of a model
    that has a projection.
    """

    def __init__(self, module: nn.Module) -> None:
        """Wrap a CLIPTextModel or a CLIPTextModelWithProjection."""
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode padded prompts."""
        output = _clip(self.module, input_ids)
        projected = getattr(output, "text_embeds", None)
        pooled = output.pooler_output if projected is None else projected
        return torch.stack(output.hidden_states, 1), output.last_hidden_state, pooled


def _clip(module: nn.Module, input_ids: Tensor) -> Any:
    """All that a CLIP gives; the positions are explicit, as batched exports need them."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    positions = positions.expand(input_ids.shape[0], -1)
    return module(input_ids=input_ids, position_ids=positions, output_hidden_states=True)


class T5Text(nn.Module):
    """input_ids [batch, tokens] -> last_hidden_state [batch, tokens, width]."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap a T5EncoderModel."""
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        """Encode padded prompts; like the pipelines, without a mask."""
        return (self.module(input_ids=input_ids).last_hidden_state,)


class Sd3Transformer(nn.Module):
    """hidden_states [batch, channels, height, width], encoder_hidden_states, pooled_projections,
    time_features [batch, width] -> the raw prediction, shaped as hidden_states.
    """

    def __init__(self, module: nn.Module) -> None:
        """Wrap an SD3Transformer2DModel; it takes features instead of timesteps."""
        super().__init__()
        module.time_text_embed.time_proj = nn.Identity()  # type: ignore[union-attr]
        self.module = module

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        time_features: Tensor,
    ) -> tuple[Tensor]:
        """One step's prediction, before guidance."""
        output = self.module(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=time_features,
            return_dict=False,
        )
        return (output[0],)


class FluxTransformer(nn.Module):
    """hidden_states [batch, sequence, channels], encoder_hidden_states, pooled_projections,
    time_features [batch, width], img_rope [sequence, 2 * width], txt_rope [tokens, 2 * width] [,
    guidance_features [batch, width]] -> the raw prediction, shaped as hidden_states.

    The tables hold cosines, then sines, of the rotary embedding.
    """

    def __init__(self, module: nn.Module) -> None:
        """Wrap a FluxTransformer2DModel; it takes features and tables, not numbers and places."""
        super().__init__()
        module.time_text_embed.time_proj = _Thousandth()  # type: ignore[union-attr]
        module.pos_embed = _Halves()
        self.module = module

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        time_features: Tensor,
        img_rope: Tensor,
        txt_rope: Tensor,
        guidance_features: Tensor | None = None,
    ) -> tuple[Tensor]:
        """One step's prediction."""
        output = self.module(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=time_features,
            img_ids=img_rope,
            txt_ids=txt_rope,
            guidance=guidance_features,
            return_dict=False,
        )
        return (output[0],)


class _Thousandth(nn.Module):
    """Undoes the factor that FluxTransformer2DModel gives what it takes for a timestep."""

    def forward(self, features: Tensor) -> Tensor:
        return features / 1000


class _Halves(nn.Module):
    def forward(self, table: Tensor) -> tuple[Tensor, Tensor]:
        cosines, sines = table.chunk(2, dim=-1)
        return cosines, sines


class VaeDecoder(nn.Module):
    """latent [batch, channels, h, w] (already divided by scaling_factor) -> image in -1..1."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap an AutoencoderKL or an AutoencoderTiny, and drop its encoding half."""
        super().__init__()
        for name in ("encoder", "quant_conv"):
            setattr(module, name, None)
        self.module = module

    def forward(self, latent: Tensor) -> tuple[Tensor]:
        """Decode."""
        before = getattr(self.module, "post_quant_conv", None)
        if before is not None:
            latent = before(latent)
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


class TinyVaeEncoder(nn.Module):
    """image in -1..1 -> latents [batch, channels, h, w]."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap an AutoencoderTiny and drop its decoding half."""
        super().__init__()
        module.decoder = None  # type: ignore[assignment]
        self.module = module

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """Encode."""
        return (self.module.encoder(image),)  # type: ignore[operator]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "clip_text": ClipText,
    "clip_plain": ClipPlain,
    "clip_hidden": ClipHidden,
    "t5_text": T5Text,
    "controlnet": ControlNet,
    "unet": unet_wrapper,
    "unet_control": ControlledUNet,
    "unet_timestep": TimestepUNet,
    "sd3_transformer": Sd3Transformer,
    "flux_transformer": FluxTransformer,
    "vae_decoder": VaeDecoder,
    "vae_decoder_after": DecoderAfter,
    "vae_decoder_before": DecoderBefore,
    "vae_encoder": VaeEncoder,
    "vae_encoder_after": EncoderAfter,
    "vae_encoder_before": EncoderBefore,
    "tiny_vae_encoder": TinyVaeEncoder,
}
"""The wrappers by their names in families and manifests: each a calling convention."""
