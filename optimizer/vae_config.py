"""What an autoencoder's config must say for it to be the VAE of a pipeline here.

Read without torch, so that a wrong one is refused in the plan, before its weights are downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from profiles.errors import SpecError

__all__ = ["AUTOENCODERS", "TINY", "completed", "require_fitting", "require_known", "splits"]

TINY = "AutoencoderTiny"
"""diffusers' class of TAESD and its kin."""

Channels = Annotated[int, Field(ge=1)]
Blocks = Annotated[tuple[Channels, ...], Field(min_length=1)]
Factor = Annotated[float, Field(gt=0)]


class _Autoencoder(BaseModel):
    """What kiln and diffusers' pipelines read of a config; absent keys are diffusers' defaults."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    in_channels: Channels = 3
    out_channels: Channels = 3
    latent_channels: Channels = 4


class _Kl(_Autoencoder):
    """Of diffusers 0.42's AutoencoderKL.__init__."""

    block_out_channels: Blocks
    """Never left out: diffusers' default is no published model's."""
    scaling_factor: Factor = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True


class _Tiny(_Autoencoder):
    """Of diffusers 0.42's AutoencoderTiny.__init__."""

    encoder_block_out_channels: Blocks = (64, 64, 64, 64)
    decoder_block_out_channels: Blocks = (64, 64, 64, 64)
    upsampling_scaling_factor: int = Field(default=2, ge=1)
    scaling_factor: Factor = 1.0
    shift_factor: float = 0.0


_PARSED: dict[str, type[_Kl | _Tiny]] = {"AutoencoderKL": _Kl, TINY: _Tiny}

AUTOENCODERS = tuple(_PARSED)
"""diffusers' classes that can be the VAE."""


def completed(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The config with what diffusers adds to it; one of another class as it is.

    An old file lacks keys that pipelines read, and AutoencoderTiny gives itself the
    `block_out_channels` that they count a latent's pixels by. Raises SpecError for illegal values.
    """
    parsed = _parsed(config, where=where)
    if parsed is None:
        return dict(config)
    found = {**config, **parsed.model_dump(mode="json")}
    if isinstance(parsed, _Tiny):
        found["block_out_channels"] = list(parsed.decoder_block_out_channels)
        found["force_upcast"] = False
    return found


def _parsed(config: Mapping[str, Any], *, where: str) -> _Kl | _Tiny | None:
    kind = _PARSED.get(str(config.get("_class_name")))
    try:
        return None if kind is None else kind.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        name = first["loc"][0]
        if first["type"] == "missing":
            raise SpecError(
                f'{where}/config.json has no "{name}", which kiln needs: download it again, or add '
                "it."
            ) from error
        raise SpecError(
            f'{where}/config.json has {json.dumps(first["input"])[:40]} for "{name}" '
            f"({first['msg']}): download it again, or correct it."
        ) from error


def require_known(config: Mapping[str, Any], *, where: str) -> None:
    """Raise SpecError for an autoencoder that can't be a VAE here; `config` is completed."""
    name = str(config.get("_class_name"))
    if name not in AUTOENCODERS:
        raise SpecError(
            f"{where} is of class {name}, which can't be a VAE here: give an "
            f"{' or '.join(AUTOENCODERS)} (the _class_name of its config.json)"
        )
    if name == TINY:
        up = int(config["upsampling_scaling_factor"]) ** (_levels(config, "decoder_") - 1)
        down = 2 ** (_levels(config, "encoder_") - 1)
        if not up == down == _factor(config):
            raise SpecError(
                f"{where} encodes {down} pixels a side to a latent and decodes it to {up}, where "
                f"diffusers' pipelines count {_factor(config)}: give one whose halves have the "
                "same number of levels, and an upsampling_scaling_factor of 2"
            )


def splits(config: Mapping[str, Any]) -> bool:
    """Whether a completed config's halves can be cut in two parts for seamless tiles: those of an
    AutoencoderKL whose blocks are of diffusers' common kind, with attention between them alone.

    All others, and backends that build no forms, have tiles that are blended (runners.tiling): an
    AutoencoderTiny has neither norms nor attention, others' differ a little from whole pictures.
    """
    kinds = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    attends = config.get("mid_block_add_attention", True)
    return config["_class_name"] == "AutoencoderKL" and kinds <= _CONVOLUTIONAL and attends


_CONVOLUTIONAL = {"DownEncoderBlock2D", "UpDecoderBlock2D"}


def require_fitting(config: Mapping[str, Any], own: Mapping[str, Any], *, where: str) -> None:
    """Raise SpecError for an autoencoder that can't stand for the model's own; both completed."""
    require_known(config, where=where)
    if config["latent_channels"] != own["latent_channels"]:
        raise SpecError(
            f"{where} has latents of {config['latent_channels']} channels and this model's own "
            f"have {own['latent_channels']}: give one that was made for this kind of model"
        )
    if _factor(config) != _factor(own):
        raise SpecError(
            f"{where} makes {_factor(config)} pixels a side of a latent and this model's own VAE "
            f"makes {_factor(own)}: give one that was made for this kind of model"
        )
    if config["_class_name"] == own["_class_name"] and _scale(config) != _scale(own):
        raise SpecError(
            f"{where} has latents of scaling_factor {config['scaling_factor']} and shift_factor "
            f"{config['shift_factor']}, and this model's own have {own['scaling_factor']} and "
            f"{own['shift_factor']}: give one that was made for this kind of model"
        )


def _levels(config: Mapping[str, Any], half: str = "") -> int:
    return len(config[f"{half}block_out_channels"])


def _factor(config: Mapping[str, Any]) -> int:
    """Pixels per latent, as diffusers' pipelines count them."""
    return int(2 ** (_levels(config) - 1))


def _scale(config: Mapping[str, Any]) -> tuple[float, float]:
    return float(config["scaling_factor"]), float(config["shift_factor"] or 0)
