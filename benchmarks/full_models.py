"""Whole pipelines at full size with random weights, from configs: for time, bytes and memory.

Their text can't be understood and their pictures are noise; shapes, bytes and paces are real.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optimizer.progress import Progress

__all__ = [
    "SD15_UNET",
    "SDXL_UNET",
    "make_sd15",
    "make_sd15_vae",
    "make_sdxl",
]

SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""Stable Diffusion 1.5's unet/config.json where it differs from diffusers' defaults."""

_SD15_VAE: dict[str, Any] = {
    "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_SD15_TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}

SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""stable-diffusion-xl-base-1.0's unet/config.json where it differs from diffusers' defaults: 2567
million parameters."""

_SDXL_VAE: dict[str, Any] = {
    **_SD15_VAE,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
_SDXL_TEXT_2: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
_TOKENIZER = Path(__file__).parent / "reference_model" / "model" / "tokenizer"


def make_sd15(out: Path, progress: Progress) -> None:
    """Write a Stable Diffusion 1.5 of random weights (fp16, seed 0) as a diffusers folder.

    Its tokenizer is the reference model's, for 77 tokens.
    """
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = _tokenizer()
    parts = {
        "vae": lambda: diffusers.AutoencoderKL(**_SD15_VAE),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**_SD15_TEXT, **_ends(tokenizer))),
        "unet": lambda: diffusers.UNet2DConditionModel(**SD15_UNET),
    }
    _save(out, "StableDiffusionPipeline", parts, {"tokenizer": tokenizer}, progress)


def make_sd15_vae(out: Path, progress: Progress) -> None:
    """Write the VAE of Stable Diffusion 1.5 of random weights, beside a denoiser and a text encoder
    that are as small as can be: for what only the VAE does.
    """
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = _tokenizer()
    text = {**_SD15_TEXT, "hidden_size": 32, "intermediate_size": 32, "projection_dim": 32}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    unet = {
        "sample_size": 64,
        "block_out_channels": [32, 32, 32],
        "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 32,
    }
    parts = {
        "vae": lambda: diffusers.AutoencoderKL(**_SD15_VAE),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**text, **_ends(tokenizer))),
        "unet": lambda: diffusers.UNet2DConditionModel(**unet),
    }
    _save(out, "StableDiffusionPipeline", parts, {"tokenizer": tokenizer}, progress)


def make_sdxl(out: Path, progress: Progress) -> None:
    """Write a Stable Diffusion XL of random weights (fp16, seed 0) as a diffusers folder.

    Its tokenizers are the reference model's, for 77 tokens.
    """
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = _tokenizer()
    ends = _ends(tokenizer)
    parts = {
        "vae": lambda: diffusers.AutoencoderKL(**_SDXL_VAE),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**_SD15_TEXT, **ends)),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(
            CLIPTextConfig(**_SDXL_TEXT_2, **ends)
        ),
        "unet": lambda: diffusers.UNet2DConditionModel(**SDXL_UNET),
    }
    tokenizers = {"tokenizer": tokenizer, "tokenizer_2": tokenizer}
    _save(out, "StableDiffusionXLPipeline", parts, tokenizers, progress)


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(_TOKENIZER, model_max_length=77)


def _ends(tokenizer: Any) -> dict[str, int]:
    return {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos")}


def _save(
    out: Path,
    pipeline_class: str,
    parts: Mapping[str, Callable[[], Any]],
    tokenizers: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Write the pipeline, one component in memory at a time."""
    import torch
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    index: dict[str, Any] = {"_class_name": pipeline_class, "scheduler": _listed(scheduler)}
    scheduler.save_pretrained(out / "scheduler")
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(out / name)
        index[name] = ["transformers", "CLIPTokenizer"]
    for number, (name, make) in enumerate(parts.items(), start=1):
        module = make().to(torch.float16)
        module.save_pretrained(out / name)
        index[name] = _listed(module)
        progress(number, len(parts))
    (out / "model_index.json").write_text(json.dumps(index), "utf-8")


def _listed(part: Any) -> list[str]:
    """A part's library and class, as model_index.json has them."""
    return [type(part).__module__.partition(".")[0], type(part).__name__]
