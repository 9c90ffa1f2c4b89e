"""Whole pipelines at full size with random weights, from configs: for time, bytes and memory.

Their text can't be understood and their pictures are noise; shapes, bytes and paces are real.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from optimizer.progress import Progress

__all__ = ["SD15_UNET", "make_sd15"]

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
_TOKENIZER = Path(__file__).parent / "reference_model" / "model" / "tokenizer"


def make_sd15(out: Path, progress: Progress) -> None:
    """Write a Stable Diffusion 1.5 of random weights (fp16, seed 0) as a diffusers folder.

    Its tokenizer is the reference model's, for 77 tokens.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from diffusers import StableDiffusionPipeline as Pipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(_TOKENIZER, model_max_length=77)
    ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos")}
    pipeline = Pipeline(
        vae=AutoencoderKL(**_SD15_VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**_SD15_TEXT, **ends)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**SD15_UNET),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    progress(1, 2)
    shutil.rmtree(out)
    pipeline.to(torch.float16).save_pretrained(out)
    progress(2, 2)
