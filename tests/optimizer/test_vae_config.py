from __future__ import annotations

import json
from inspect import signature
from typing import Any

import pytest

from optimizer.families import family
from optimizer.families.base import Ranges
from optimizer.families.parts import VAE, vae_factor, vae_signatures, with_vae
from optimizer.vae_config import AUTOENCODERS, completed, require_fitting, require_known
from profiles.errors import SpecError

TAESD: dict[str, Any] = {
    "_class_name": "AutoencoderTiny",
    "act_fn": "relu",
    "decoder_block_out_channels": [64, 64, 64, 64],
    "encoder_block_out_channels": [64, 64, 64, 64],
    "latent_channels": 4,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "scaling_factor": 1.0,
    "upsampling_scaling_factor": 2,
}
"""What files of diffusers 0.20 say: no block_out_channels, no shift_factor."""

KL: dict[str, Any] = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512]}
"""The same of 0.4: no scaling_factor either."""


def full(config: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return completed({**config, **changed}, where="the VAE")


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_a_bare_config_gets_what_diffusers_gives_it(name: str) -> None:
    import diffusers

    parameters = signature(getattr(diffusers, name).__init__).parameters
    bare = {} if name == "AutoencoderTiny" else {"block_out_channels": [32]}
    found = completed({"_class_name": name, **bare}, where="the VAE")
    added = {"block_out_channels", "force_upcast"} if name == "AutoencoderTiny" else set()
    for key in set(found) - {"_class_name", *bare} - added:
        default = parameters[key].default
        assert found[key] == (list(default) if isinstance(default, tuple) else default)
    config = getattr(diffusers, name)(**bare).config
    for key in added:
        assert found[key] == (list(value) if isinstance(value := config[key], tuple) else value)


def test_what_a_config_says_stays() -> None:
    config = {**KL, "scaling_factor": 0.13025, "mid_block_add_attention": False}
    assert config.items() <= full(config).items()
    other = {"_class_name": "AutoencoderDC", "latent_channels": 32}
    assert completed(other, where="the VAE") == other


@pytest.mark.parametrize("config", [TAESD, KL])
def test_a_latents_pixels_are_counted_as_diffusers_pipelines_do(config: dict[str, Any]) -> None:
    assert vae_factor({"vae": full(config)}) == 8


def test_an_encoder_gives_moments_and_a_tiny_one_latents() -> None:
    ranges = Ranges(256, 512, 1024, 2)
    for config, name, channels in ((KL, "moments", 8), (TAESD, "latents", 4)):
        found = vae_signatures({"vae": full(config)}, ranges, 8)
        [output] = found["vae_encoder"].outputs
        assert (output.name, output.axes[1]) == (name, channels)
        assert found["vae_decoder"].inputs[0].axes[1] == 4


def test_only_the_encoders_wrapper_is_another_one() -> None:
    known = family("sdxl")
    assert with_vae(known, full(KL)) is known
    changed = {
        spec.name: spec.wrapper
        for spec in with_vae(known, full(TAESD)).components
        if spec not in known.components
    }
    assert changed == {"vae_encoder": "tiny_vae_encoder"}
    assert {spec.name for spec in VAE} == {"vae_decoder", "vae_encoder"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "AutoencoderDC"}, "is of class AutoencoderDC, which can't be a VAE here"),
        ({"latent_channels": 4}, "give an AutoencoderKL or AutoencoderTiny"),
        ({**TAESD, "upsampling_scaling_factor": 4}, "decodes it to 64, where diffusers' pipelines"),
        ({**TAESD, "encoder_block_out_channels": [64, 64, 64]}, "encodes 4 pixels a side to a"),
    ],
)
def test_what_cannot_be_a_vae_is_said(config: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        require_known(full(config), where="it")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("latent_channels", "four"),
        ("latent_channels", 0),
        ("decoder_block_out_channels", []),
        ("scaling_factor", 0),
        ("scaling_factor", float("nan")),
        ("upsampling_scaling_factor", None),
    ],
)
def test_an_illegal_value_is_named(key: str, value: object) -> None:
    with pytest.raises(SpecError) as caught:
        full(TAESD, **{key: value})
    assert str(caught.value).startswith(
        f'the VAE/config.json has {json.dumps(value)[:40]} for "{key}" ('
    )


SDXL = full(KL, scaling_factor=0.13025)


@pytest.mark.parametrize(
    ("config", "own", "words"),
    [
        (full(TAESD, latent_channels=16), full(KL), "latents of 16 channels and this model's own"),
        (full(KL, block_out_channels=[64, 64]), full(KL), "makes 2 pixels a side of a latent and"),
        (full(KL), SDXL, "scaling_factor 0.18215 and shift_factor None, and this model's own have"),
        (full(KL, shift_factor=0.1), full(KL), "shift_factor 0.1, and this model's own have 0.182"),
    ],
)
def test_what_does_not_fit_the_model_is_said(
    config: dict[str, Any], own: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError) as caught:
        require_fitting(config, own, where="--vae it")
    assert words in str(caught.value)
    assert str(caught.value).endswith("give one that was made for this kind of model")


@pytest.mark.parametrize("own", [full(KL), SDXL, full(TAESD)])
def test_a_tiny_one_stands_for_any_of_its_size(own: dict[str, Any]) -> None:
    require_fitting(full(TAESD), own, where="it")
    require_fitting(own, own, where="it")
