"""What makes the shipped configs small: few and narrow layers, with which every pipeline draws."""

from __future__ import annotations

from typing import Any

__all__ = ["SMALL", "Change"]

Change = dict[str, Any]

_CLIP: Change = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "projection_dim": 32,
}
_T5: Change = {"d_ff": 32, "d_kv": 8, "d_model": 64, "num_heads": 2, "num_layers": 2}
_VAE: Change = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "layers_per_block": 1,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
_UNET: Change = {
    "attention_head_dim": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
_UNET_XL: Change = {
    **_UNET,
    "addition_time_embed_dim": 8,
    "attention_head_dim": [4, 8],
    "cross_attention_dim": 64,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 80,
    "transformer_layers_per_block": [1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
_SD3: Change = {
    "caption_projection_dim": 64,
    "joint_attention_dim": 64,
    "num_attention_heads": 1,
    "num_layers": 2,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 12,
}
_SD35: Change = {
    **_SD3,
    "attention_head_dim": 16,
    "dual_attention_layers": [0],
    "num_attention_heads": 4,
    "num_layers": 3,
    "qk_norm": "rms_norm",
}
_FLUX: Change = {
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "joint_attention_dim": 64,
    "num_attention_heads": 2,
    "num_layers": 2,
    "num_single_layers": 3,
    "pooled_projection_dim": 32,
}
_TINY_VOCABULARY: Change = {
    "bos_token_id": 48,
    "eos_token_id": 49,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "vocab_size": 50,
}
SMALL: dict[str, dict[str, Change]] = {
    "sd1": {"text_encoder": _TINY_VOCABULARY, "unet": _UNET, "vae": _VAE},
    "sd2": {"text_encoder": _TINY_VOCABULARY, "unet": _UNET, "vae": _VAE},
    "sdxl": {"text_encoder": _CLIP, "text_encoder_2": _CLIP, "unet": _UNET_XL, "vae": _VAE},
    "sdxl_refiner": {
        "text_encoder_2": _CLIP,
        "unet": {
            **_UNET_XL,
            "cross_attention_dim": 32,
            "projection_class_embeddings_input_dim": 72,
        },
        "vae": _VAE,
    },
    "sd3": {
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP,
        "text_encoder_3": _T5,
        "transformer": _SD3,
        "vae": _VAE,
    },
    "flux": {"text_encoder": _CLIP, "text_encoder_2": _T5, "transformer": _FLUX, "vae": _VAE},
}
"""Family -> component -> what its config changes."""
