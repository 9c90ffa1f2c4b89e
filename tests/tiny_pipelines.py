"""Random-weight diffusers pipelines of a few megabytes, built from configs, offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

__all__ = [
    "TINY",
    "TINY_TOKENS",
    "tiny_autoencoder",
    "tiny_controlnet",
    "tiny_flux",
    "tiny_lcm",
    "tiny_refiner",
    "tiny_sd",
    "tiny_sd2",
    "tiny_sd3",
    "tiny_sdxl",
    "tiny_taesd",
    "tiny_tokenizer",
    "tiny_unet_xl",
    "tiny_vae",
]

TINY_TOKENS = 32
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-"


def _vocabulary() -> dict[str, int]:
    """Every character alone and ending a word, with the two marks last, as in CLIP's own file."""
    tokens = [*_CHARACTERS, *(f"{character}</w>" for character in _CHARACTERS)]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def tiny_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=_vocabulary(), merges=[], model_max_length=TINY_TOKENS)


def tiny_t5_tokenizer() -> Any:
    """A letter a token."""
    from transformers import T5Tokenizer

    marks = ["<pad>", "</s>", "<unk>", "\u2581"]
    pieces = [(piece, -float(i)) for i, piece in enumerate([*marks, *_CHARACTERS])]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TINY_TOKENS)


def _text_encoder(cls: str = "CLIPTextModel", **more: Any) -> Any:
    import transformers
    from transformers import CLIPTextConfig

    vocabulary = _vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        **{"hidden_size": 32, **more},
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TINY_TOKENS,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    return getattr(transformers, cls)(config)


def _t5(width: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tiny_t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
    )
    return T5EncoderModel(config)


def _unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    settings = {"cross_attention_dim": 32, "attention_head_dim": 4, **more}
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=16,
        **settings,
    )


def tiny_vae(**more: Any) -> Any:
    """An AutoencoderKL of three levels, a latent for 4x4 pixels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        **{"latent_channels": 4, **more},
    )


def _ddim(**more: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        **more,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _saved(make: Callable[[], Any], folder: Path, seed: int) -> Path:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = make()
    pipeline.save_pretrained(folder)
    return folder


def tiny_sd(folder: Path, *, seed: int = 0, inpaints: bool = False) -> Path:
    """A StableDiffusionPipeline of 3.4 M parameters in `folder`, the same for the same `seed`.

    Pictures are 64x64 (latent: [batch, 4, 16, 16]), prompts 32 tokens. Weights are safetensors. One
    that `inpaints` is a StableDiffusionInpaintPipeline, whose UNet takes 9 channels.
    """
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline

    def make() -> Any:
        cls = StableDiffusionInpaintPipeline if inpaints else StableDiffusionPipeline
        return cls(
            vae=tiny_vae(),
            text_encoder=_text_encoder(),
            tokenizer=tiny_tokenizer(),
            unet=_unet(in_channels=9) if inpaints else _unet(),
            scheduler=_ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    return _saved(make, folder, seed)


def tiny_autoencoder(folder: Path, *, seed: int = 1, **more: Any) -> Path:
    """An AutoencoderKL like `tiny_sd`'s, with other weights."""
    return _saved(lambda: tiny_vae(**more), folder, seed)


def tiny_taesd(folder: Path, *, seed: int = 2, **more: Any) -> Path:
    """An AutoencoderTiny that fits `tiny_sd`: latents of 4 channels, a quarter of the side."""

    def make() -> Any:
        import torch
        from diffusers import AutoencoderTiny

        module = AutoencoderTiny(
            **{
                "encoder_block_out_channels": (8, 8, 8),
                "decoder_block_out_channels": (8, 8, 8),
                "num_encoder_blocks": (1, 1, 1),
                "num_decoder_blocks": (1, 1, 1),
                **more,
            }
        )
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.7)  # else random layers fade, and pictures are flat
        return module

    return _saved(make, folder, seed)


def tiny_controlnet(folder: Path, model: Path, *, seed: int = 3, **more: Any) -> Path:
    """A ControlNetModel for the tiny pipeline in `model`, all of whose weights do something."""

    def make() -> Any:
        import torch
        from diffusers import ControlNetModel, UNet2DConditionModel

        unet = UNet2DConditionModel.from_pretrained(model / "unet")
        settings = {"conditioning_embedding_out_channels": (8, 16, 16), **more}
        module = ControlNetModel.from_unet(unet, **settings)
        with torch.no_grad():
            for parameter in module.parameters():
                if not parameter.any():  # the convolutions at its ends
                    parameter.normal_(0, 0.1)
        return module

    return _saved(make, folder, seed)


def tiny_sd2(folder: Path, *, seed: int = 0) -> Path:
    """A StableDiffusionPipeline as 2.x has it: velocity, heads by level, linear projections, a
    wider text encoder. Its configs lack what is diffusers' default, as those of old diffusers do.
    """
    from diffusers import StableDiffusionPipeline

    def make() -> Any:
        return StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=_text_encoder(hidden_size=48, hidden_act="gelu"),
            tokenizer=tiny_tokenizer(),
            unet=_unet(
                cross_attention_dim=48, attention_head_dim=(2, 4), use_linear_projection=True
            ),
            scheduler=_ddim(prediction_type="v_prediction"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    _saved(make, folder, seed)
    for name in ("unet", "vae"):
        _leave_out_defaults(folder / name / "config.json")
    return folder


_ALWAYS = ("_class_name", "block_out_channels", "in_channels", "latent_channels", "out_channels")
"""Keys that every diffusers wrote."""


def _leave_out_defaults(path: Path) -> None:
    import diffusers

    config = json.loads(path.read_text())
    cls = getattr(diffusers, config["_class_name"])
    defaults = {p.name: p.default for p in signature(cls.__init__).parameters.values()}
    kept = {k: v for k, v in config.items() if k in _ALWAYS or v != defaults.get(k, object())}
    assert len(kept) < len(config)
    path.write_text(json.dumps(kept))


def tiny_lcm(folder: Path, *, seed: int = 0) -> Path:
    """A LatentConsistencyModelPipeline: `tiny_sd` whose UNet takes guidance as an input."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    def make() -> Any:
        return LatentConsistencyModelPipeline(
            vae=tiny_vae(),
            text_encoder=_text_encoder(),
            tokenizer=tiny_tokenizer(),
            unet=_unet(time_cond_proj_dim=24),
            scheduler=LCMScheduler.from_config(_ddim().config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    return _saved(make, folder, seed)


def tiny_unet_xl(*, width: int = 64, sizes: int = 6, **more: Any) -> Any:
    """SDXL's, for so many numbers a token and so many of sizes, of 8 features each."""
    return _unet(
        cross_attention_dim=width,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + sizes * 8,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        **more,
    )


def tiny_sdxl(folder: Path, *, seed: int = 0) -> Path:
    """A StableDiffusionXLPipeline; sizes as `tiny_sd`'s, two text encoders."""
    from diffusers import StableDiffusionXLPipeline

    def make() -> Any:
        return StableDiffusionXLPipeline(
            vae=tiny_vae(),
            text_encoder=_text_encoder(),
            text_encoder_2=_text_encoder("CLIPTextModelWithProjection"),
            tokenizer=tiny_tokenizer(),
            tokenizer_2=tiny_tokenizer(),
            unet=tiny_unet_xl(),
            scheduler=_ddim(),
            add_watermarker=False,
        )

    return _saved(make, folder, seed)


def tiny_refiner(folder: Path, *, seed: int = 1) -> Path:
    """A StableDiffusionXLImg2ImgPipeline as SDXL's refiner: one text encoder, a score of beauty."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    def make() -> Any:
        return StableDiffusionXLImg2ImgPipeline(
            vae=tiny_vae(),
            text_encoder=None,
            text_encoder_2=_text_encoder("CLIPTextModelWithProjection"),
            tokenizer=None,
            tokenizer_2=tiny_tokenizer(),
            unet=tiny_unet_xl(width=32, sizes=5),
            scheduler=_ddim(),
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )

    return _saved(make, folder, seed)


def tiny_sd3(folder: Path, *, seed: int = 0, t5: bool = True) -> Path:
    """A StableDiffusion3Pipeline: latents of 16 channels in patches of 2, three text encoders, or
    two without `t5`.
    """
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    def make() -> Any:
        return StableDiffusion3Pipeline(
            vae=tiny_vae(
                latent_channels=16,
                shift_factor=0.06,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            text_encoder=_text_encoder("CLIPTextModelWithProjection"),
            text_encoder_2=_text_encoder("CLIPTextModelWithProjection"),
            text_encoder_3=_t5(64) if t5 else None,
            tokenizer=tiny_tokenizer(),
            tokenizer_2=tiny_tokenizer(),
            tokenizer_3=tiny_t5_tokenizer() if t5 else None,
            transformer=SD3Transformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=16,
                out_channels=16,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=4,
                caption_projection_dim=64,
                joint_attention_dim=64,
                pooled_projection_dim=64,
                pos_embed_max_size=32,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )

    return _saved(make, folder, seed)


def tiny_flux(folder: Path, *, seed: int = 0, guided: bool = True) -> Path:
    """A FluxPipeline: latents of 4 channels in patches of 2; guided as dev, else as schnell."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    def make() -> Any:
        return FluxPipeline(
            vae=tiny_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=_text_encoder(),
            text_encoder_2=_t5(),
            tokenizer=tiny_tokenizer(),
            tokenizer_2=tiny_t5_tokenizer(),
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                guidance_embeds=guided,
                axes_dims_rope=(4, 6, 6),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guided),
        )

    return _saved(make, folder, seed)


TINY: dict[str, Callable[[Path], Path]] = {
    "sd1": tiny_sd,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
}
"""Family -> its tiny pipeline."""
