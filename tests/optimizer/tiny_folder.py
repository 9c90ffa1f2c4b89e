"""A diffusers folder whose weights are a few bytes: for everything that only looks at files."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["write_json", "write_model", "write_weights"]

CONFIGS = {
    "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
    "text_encoder/config.json": {"hidden_size": 4},
    "tokenizer/tokenizer_config.json": {},
    "unet/config.json": {"sample_size": 16},
    "vae/config.json": {"latent_channels": 4},
}
WEIGHTS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


def write_json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def write_weights(path: Path, shapes: dict[str, tuple[int, ...]] | None = None) -> None:
    """Zeros in fp16."""
    import numpy as np
    from safetensors.numpy import save_file

    shapes = shapes or {"a.weight": (2, 3), "a.bias": (2,)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, path)


def write_model(folder: Path) -> Path:
    """A StableDiffusionPipeline with files beside it that aren't the model."""
    index: dict[str, object] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": [None, None],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)
    for name, config in CONFIGS.items():
        write_json(folder / name, config)
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    for width, (component, file) in enumerate(WEIGHTS.items(), start=1):
        write_weights(folder / component / file, {"a.weight": (2, width), "a.bias": (2,)})
    (folder / "README.md").write_text("not the model")
    write_weights(folder / "safety_checker" / "model.safetensors", {"a": (9,)})
    write_weights(folder / "whole-checkpoint.safetensors", {"a": (8,)})
    return folder
