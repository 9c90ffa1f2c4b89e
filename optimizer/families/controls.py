"""Control networks of UNets: what their configs must say, and the signatures of both sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from optimizer.families.base import ComponentSpec, Family, Ranges
from optimizer.families.parts import Configs, floats, vae_factor
from profiles.errors import SpecError
from runners.control_tasks import controlnet_names
from runners.signature import Dim, Signature, TensorSpec

__all__ = [
    "CONTROLNETS",
    "controlled_signature",
    "require_control_fitting",
    "require_control_known",
    "with_controls",
]

CONTROLNETS = ("ControlNetModel",)
"""diffusers' classes of control networks that are known here."""

Config = Mapping[str, Any]

_SAME = (
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)
"""What a control network shares with its UNet, else its residuals or its inputs don't fit."""

_DEFAULTS: dict[str, Any] = {
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "block_out_channels": [320, 640, 1280, 1280],
    "class_embed_type": None,
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "cross_attention_dim": 1280,
    "encoder_hid_dim": None,
    "global_pool_conditions": False,
    "in_channels": 4,
    "layers_per_block": 2,
    "num_class_embeds": None,
    "projection_class_embeddings_input_dim": None,
}
"""Of diffusers 0.42's ControlNetModel and, where both have them, UNet2DConditionModel."""


def _value(config: Config, key: str) -> Any:
    found = config.get(key, _DEFAULTS[key])
    return list(found) if isinstance(found, tuple) else found


def require_control_known(config: Config, *, where: str) -> None:
    """Raise SpecError for a config that no control network here has."""
    name = config.get("_class_name")
    if name not in CONTROLNETS:
        raise SpecError(
            f"{where} is of class {name}, and kiln knows control networks of class "
            f"{' and '.join(CONTROLNETS)}: give one that was made for Stable Diffusion 1.x, 2.x or "
            "XL (the _class_name of its config.json)"
        )
    for key in ("class_embed_type", "encoder_hid_dim", "num_class_embeds"):
        if (value := _value(config, key)) is not None:
            raise SpecError(f"{where} has {key} {value}, which no control network here may have")
    if _value(config, "global_pool_conditions"):
        raise SpecError(
            f"{where} has global_pool_conditions, which the engines have no input for: give another"
        )
    if (channels := _value(config, "conditioning_channels")) != 3:
        raise SpecError(f"{where} takes images of {channels} channels: give one that takes 3")


def require_control_fitting(config: Config, configs: Configs, *, where: str) -> None:
    """Raise SpecError, with both values, for a control network that was made for another UNet.

    `configs` are those of the model's folders.
    """
    require_control_known(config, where=where)
    unet, factor = configs["unet"], vae_factor(configs)
    for key in _SAME:
        own, wanted = _value(config, key), _value(unet, key)
        if own != wanted:
            raise SpecError(
                f"{where} has {key} {_text(own)} and this model's UNet has {_text(wanted)}: give "
                "one that was made for this kind of model"
            )
    latents = int(configs["vae"]["latent_channels"])
    if (channels := int(_value(config, "in_channels"))) != latents:
        raise SpecError(
            f"{where} takes latents of {channels} channels and this model's have {latents}: give "
            "one that was made for this kind of model"
        )
    if (own_factor := _pixels(config)) != factor:
        raise SpecError(
            f"{where} takes {own_factor} pixels a side of a latent and this model's VAE makes "
            f"{factor}: give one that was made for this kind of model"
        )


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _pixels(config: Config) -> int:
    """A side of what lies under a latent: each level of the image's embedding but the last halves
    the side.
    """
    return int(2 ** (len(_value(config, "conditioning_embedding_out_channels")) - 1))


def with_controls(known: Family, count: int) -> Family:
    """The family with so many control networks; each in a folder of its own name."""
    if count == 0:
        return known
    specs = tuple(
        ComponentSpec(name, "controlnet", name, "controlnet") for name in controlnet_names(count)
    )
    signatures = partial(_signatures, known, controlnet_names(count))
    return replace(known, components=(*known.components, *specs), signatures=signatures)


def _signatures(
    known: Family, names: tuple[str, ...], configs: Configs, ranges: Ranges
) -> dict[str, Signature]:
    """Those of the family, and those of its control networks."""
    found = known.signatures(configs, ranges)
    for name in names:
        found[name] = _control_signature(found["unet"], configs[name], configs["unet"])
    return found


def _control_signature(unet: Signature, config: Config, unet_config: Config) -> Signature:
    """What the UNet takes, in the order of `runners.controls.ControlNet`, and a residual a skip."""
    own = {spec.name: spec for spec in unet.inputs}
    own.pop("timestep_cond", None)
    sample = floats("sample", "batch", int(_value(config, "in_channels")), "height", "width")
    cells = floats("controlnet_cells", "batch", 3 * _pixels(config) ** 2, "height", "width")
    scale = floats("conditioning_scale", 1)
    added = [own[name] for name in ("text_embeds", "size_features") if name in own]
    return Signature(
        inputs=(
            sample,
            own["time_features"],
            own["encoder_hidden_states"],
            cells,
            scale,
            *added,
        ),
        outputs=_residuals(unet_config),
        dims=unet.dims,
    )


def controlled_signature(unet: Signature, config: Config) -> Signature:
    """The UNet's signature with a residual for every skip and the middle as further inputs.

    The sides of inner ones are dims of their own, which follow from those of the latents.
    """
    scales = range(1, len(_value(config, "block_out_channels")))
    inner = [_halved(unet.dim(side), scale) for scale in scales for side in ("height", "width")]
    return unet.model_copy(
        update={"inputs": (*unet.inputs, *_residuals(config)), "dims": (*unet.dims, *inner)}
    )


def _halved(side: Dim, times: int) -> Dim:
    per = 2**times
    low, opt, high = (-(-value // per) for value in (side.min, side.opt, side.max))
    return Dim(name=_inner(side.name, times), min=low, opt=opt, max=high, of=side.name, per=per)


def _inner(side: str, times: int) -> str:
    return side if times == 0 else f"{side}_{2**times}"


def _residuals(unet: Config) -> tuple[TensorSpec, ...]:
    """`down_residual_0`, ...: [batch, channels, height / 2^k, width / 2^k], rounded up; then
    `mid_residual`. Every downsampling of UNet2DConditionModel halves a side and rounds it up.
    """
    channels = [int(n) for n in _value(unet, "block_out_channels")]
    per_block = _value(unet, "layers_per_block")
    layers = per_block if isinstance(per_block, list) else [per_block] * len(channels)
    skips = [(channels[0], 0)]
    for level, (width, count) in enumerate(zip(channels, layers, strict=True)):
        skips += [(width, level)] * count
        if level + 1 < len(channels):
            skips.append((width, level + 1))
    named = [(f"down_residual_{i}", *skip) for i, skip in enumerate(skips)]
    named.append(("mid_residual", channels[-1], len(channels) - 1))
    return tuple(
        floats(name, "batch", width, _inner("height", level), _inner("width", level))
        for name, width, level in named
    )
