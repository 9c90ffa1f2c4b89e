"""Single-file Stable Diffusion 1.x and 2.x checkpoints (latent-diffusion keys) -> diffusers folder.

The configs are in assets/, so that no network is needed. Keys are renamed by diffusers' own
converters; one component's weights are in memory at a time.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from optimizer.weights import read_header
from profiles.errors import SpecError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    Weights = dict[str, Tensor]

__all__ = ["convert", "convert_with", "write_clip_vocabulary"]

_ASSETS = Path(__file__).parent / "assets"
_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_CLIP = "cond_stage_model.transformer."
_OPEN_CLIP = "cond_stage_model.model."

_V_PROBE = _UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_LIMIT = 0.09
"""Keys don't tell a 2.x model that predicts velocity (768 pixels) from one that predicts noise (512
pixels). Its last attention's norm does in practice: ComfyUI's limit for the standard deviation
(comfy/supported_models.py, class SD20)."""


def convert(checkpoint: Path, folder: Path) -> None:
    """Write the diffusers folder of a checkpoint with the configs of its version.

    Raises `SpecError` where weights are missing or of another shape, `UnsupportedError` for
    inpainting and other models whose UNet doesn't take 4 channels.
    """
    shapes = read_header(checkpoint)
    channels = shapes[_UNET + "input_blocks.0.0.weight"].shape[1]
    if channels != 4:
        raise UnsupportedError(
            f"{checkpoint} has a UNet of {channels} input channels (9: inpainting, 5: depth): give "
            "the text-to-image version of it, whose UNet has 4"
        )
    width = shapes[_UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    convert_with(checkpoint, folder, configs=_ASSETS / ("sd1" if width == 768 else "sd2"))
    write_clip_vocabulary(folder / "tokenizer")
    if width == 1024 and _predicts_velocity(checkpoint):
        _state_velocity(folder)


def convert_with(checkpoint: Path, folder: Path, *, configs: Path) -> None:
    """Write the weights of a checkpoint beside a copy of the config folder `configs`."""
    shutil.copytree(configs, folder, dirs_exist_ok=True)
    for component, convert_weights in _CONVERTERS.items():
        path = folder / component
        config = json.loads((path / "config.json").read_bytes())
        weights = convert_weights(checkpoint, config)
        _save(weights, path, config, component, checkpoint)


def write_clip_vocabulary(folder: Path) -> None:
    """Write CLIP's vocab.json (49408 entries) and merges.txt from the shipped merges.

    As in OpenAI's simple_tokenizer.py: 256 bytes, the same ending a word, one entry a merge, two
    marks.
    """
    text = gzip.decompress((_ASSETS / "clip" / "merges.txt.gz").read_bytes()).decode()
    merges = text.splitlines()[1:]
    characters = _byte_characters()
    words = [*characters, *(character + "</w>" for character in characters)]
    words += ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merges.txt").write_text(text, encoding="utf-8", newline="\n")
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8", newline="\n")


def _byte_characters() -> list[str]:
    """Return a visible character for each byte, in CLIP's order: those that are visible first."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = 256 - len(visible)
    return [chr(byte) for byte in visible] + [chr(256 + i) for i in range(others)]


def _read(checkpoint: Path, *prefixes: str) -> Weights:
    from safetensors import safe_open

    with safe_open(checkpoint, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefixes)]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


def _unet_weights(checkpoint: Path, config: dict[str, Any]) -> Weights:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    weights: Weights = convert_ldm_unet_checkpoint(_read(checkpoint, _UNET), config)
    return weights


def _vae_weights(checkpoint: Path, config: dict[str, Any]) -> Weights:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    weights: Weights = convert_ldm_vae_checkpoint(_read(checkpoint, _VAE), config)
    return weights


def _text_weights(checkpoint: Path, config: dict[str, Any]) -> Weights:
    """1.x has CLIP in transformers' own names, 2.x has OpenCLIP."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    open_clip = _read(checkpoint, _OPEN_CLIP)
    if open_clip:
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
        weights: Weights = convert_open_clip_checkpoint(model, open_clip, prefix=_OPEN_CLIP)
        return weights
    clip = _read(checkpoint, _CLIP)
    return {name.removeprefix(_CLIP): tensor for name, tensor in clip.items()}


_CONVERTERS: dict[str, Callable[[Path, dict[str, Any]], Weights]] = {
    "text_encoder": _text_weights,
    "unet": _unet_weights,
    "vae": _vae_weights,
}


def _expected_shapes(component: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return what the component's module has, built without memory for its weights."""
    import torch

    with torch.device("meta"):
        if component == "text_encoder":
            from transformers import CLIPTextConfig, CLIPTextModel

            module: Any = CLIPTextModel(CLIPTextConfig(**config))
        else:
            import diffusers

            module = getattr(diffusers, config["_class_name"]).from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _save(
    weights: Weights, path: Path, config: dict[str, Any], component: str, checkpoint: Path
) -> None:
    """Save the weights that the component's module has; all must be there in the right shape.

    transformers 5 dropped "text_model." from CLIP's names and still reads it: the hub's folders
    have it, so ours do.
    """
    from safetensors.torch import save_file

    prefix = "text_model." if component == "text_encoder" else ""
    weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    expected = _expected_shapes(component, config)
    expected = {name.removeprefix(prefix): shape for name, shape in expected.items()}
    wrong = [name for name, shape in expected.items() if _shape(weights.get(name)) != shape]
    if wrong:
        raise SpecError(
            f"{checkpoint} lacks {len(wrong)} of the {len(expected)} weights of its {component}, "
            f"or has them in another shape (the first is {wrong[0]}): give a full checkpoint, with "
            "text encoder and VAE inside"
        )
    stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    save_file(
        {prefix + name: weights[name].contiguous() for name in expected},
        path / f"{stem}.safetensors",
        metadata={"format": "pt"},
    )


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _predicts_velocity(checkpoint: Path) -> bool:
    probe = _read(checkpoint, _V_PROBE).get(_V_PROBE)
    return probe is not None and float(probe.float().std(unbiased=False)) > _V_LIMIT


def _state_velocity(folder: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "scheduler/scheduler_config.json": {"prediction_type": "v_prediction"},
        "unet/config.json": {"sample_size": 96},
        "vae/config.json": {"sample_size": 768},
    }
    for file, change in changes.items():
        config = {**json.loads((folder / file).read_bytes()), **change}
        text = json.dumps(config, indent=2) + "\n"
        (folder / file).write_text(text, encoding="utf-8", newline="\n")
