"""LoRA files for the tiny pipelines, random but strong enough to be seen, in several layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

__all__ = ["kohya_lora", "peft_lora"]

TARGETS = {
    "unet": [
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv"),
    ],
    "transformer": ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"],
    "text_encoder_2": ["k_proj", "fc2"],
}
"""Attention and feed-forward parts, and convolutions with a kernel, a stride and without."""


def peft_lora(pipeline: Any, path: Path, *, rank: int = 4, seed: int = 0, scale: float = 1) -> Path:
    """Give the torch pipeline's modules low-rank parts, and save these as diffusers does.

    The pipeline keeps nothing of it.
    """
    torch.manual_seed(seed)
    parts: dict[str, Any] = {}
    for name in (*_denoisers(pipeline), "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, name, None)
        if module is None or type(module).__name__.startswith("T5"):
            continue
        config = LoraConfig(r=rank, target_modules=TARGETS[name], init_lora_weights=False)
        module.add_adapter(config)
        found = get_peft_model_state_dict(module)
        parts[name] = {
            key: scale * 4 * torch.randn_like(value) * 0.05 for key, value in found.items()
        }
        module.delete_adapters("default") if hasattr(module, "delete_adapters") else None
    tensors = {f"{name}.{key}": value for name, own in parts.items() for key, value in own.items()}
    safetensors.torch.save_file(tensors, path)
    return path


def kohya_lora(peft_file: Path, path: Path, *, alpha: float = 2.0) -> Path:
    """The same file as kohya's trainer names its tensors, with an alpha a layer."""
    found: dict[str, torch.Tensor] = {}
    for key, value in safetensors.torch.load_file(peft_file).items():
        component, _, rest = key.partition(".")
        layer, _, end = rest.rpartition(".lora_")
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te"}[component]
        if component == "text_encoder":
            layer = f"text_model.{layer.removeprefix('text_model.')}"
        name = f"{prefix}_{layer.replace('.', '_')}"
        found[f"{name}.lora_{'down' if end.startswith('A') else 'up'}.weight"] = value
        found[f"{name}.alpha"] = torch.tensor(alpha)
    safetensors.torch.save_file(found, path)
    return path


def _denoisers(pipeline: Any) -> list[str]:
    return [name for name in ("unet", "transformer") if getattr(pipeline, name, None) is not None]
