"""Single-file checkpoints of community hubs -> a diffusers folder in the store, once, offline."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from optimizer import families
from optimizer.layout import PICKLES, known_families
from optimizer.store import Store
from optimizer.weights import Parameter, read_header
from profiles.errors import SpecError, UnsupportedError
from runners.receipts import sha256_of

__all__ = ["CONVERTERS", "convert"]

CONVERTERS: dict[str, str] = {
    "flux": "optimizer.families.flux_checkpoint:convert",
    "sd1": "optimizer.families.sd1_checkpoint:convert",
    "sd3": "optimizer.families.sd3_checkpoint:convert",
    "sdxl": "optimizer.families.sdxl_checkpoint:convert",
}
"""Family -> function(checkpoint: Path, folder: Path) that writes a diffusers folder."""

_LOOKED_FOR: dict[str, str] = {
    "flux": "double_blocks.0.img_attn.qkv.weight with vector_in.in_layer.weight",
    "sd1": "model.diffusion_model.input_blocks.1.1.*.attn2.to_k.weight of 768 or 1024 columns",
    "sd3": "joint_blocks.0.context_block.attn.qkv.weight",
    "sdxl": "model.diffusion_model.label_emb.0.0.weight of 2816 or 2560 columns",
}
"""Family -> what a sentence says of its `owns_checkpoint`."""

_PIECES = {
    "a LoRA": re.compile(r"lora|lycoris|hada_w|lokr_w"),
    "an embedding (textual inversion)": re.compile(r"emb_params$|clip_[lg]$|string_to_param"),
    "a ControlNet": re.compile(r"control_model\.|controlnet_|input_hint_block\.|zero_convs\."),
    "one component": re.compile(
        r"(down_blocks|mid_block|up_blocks|text_model|transformer_blocks|single_transformer_blocks"
        r"|encoder|decoder|shared|cond_stage_model|conditioner|first_stage_model)\."
    ),
}
"""What a file without a denoiser is, by how one of its names begins; LoRAs by what it holds."""

_VERSION = 3
"""Raised when a converter writes anything else than before."""


def convert(
    checkpoint: Path,
    store: Store,
    *,
    prediction_type: str | None = None,
    always_hash: bool = False,
) -> Path:
    """Return the diffusers folder of a .safetensors checkpoint; it is kept in the store.

    Weights keep their type. `prediction_type` is what the denoiser predicts, where the file's own
    marks and weights would tell something else; with `always_hash`, the checkpoint's receipt is
    ignored. Raises `SpecError` for another kind of file, `UnsupportedError` for an unknown family.
    """
    family = _detect(checkpoint)
    key: dict[str, object] = {
        "checkpoint": sha256_of(checkpoint, always=always_hash),
        "converter": [CONVERTERS[family], _VERSION],
    }
    if prediction_type is not None:
        key["prediction_type"] = prediction_type
    found = store.find("source", key)
    if found is None:
        module, function = CONVERTERS[family].split(":")
        write: Callable[[Path, Path], None] = getattr(importlib.import_module(module), function)
        with store.create("source", key, needed_bytes=_folder_bytes(checkpoint)) as folder:
            write(checkpoint, folder)
            if prediction_type is not None:
                _set_prediction(folder, prediction_type, checkpoint)
        found = store.find("source", key)
        assert found is not None
    return found


def _set_prediction(folder: Path, prediction_type: str, checkpoint: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_bytes())
    if "prediction_type" not in config:
        raise SpecError(
            f"{checkpoint} is of a family that predicts a flow and nothing else: leave "
            "--prediction-type out"
        )
    config["prediction_type"] = prediction_type
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")


def _detect(checkpoint: Path) -> str:
    if checkpoint.suffix in PICKLES:
        raise SpecError(
            f"{checkpoint} is a pickle, which can run code when it is loaded: convert it with "
            f"`python -m optimizer.unpickle {checkpoint}`, or use the .safetensors version of it"
        )
    if checkpoint.suffix != ".safetensors":
        raise SpecError(
            f"{checkpoint} is no model: give a diffusers folder, a .safetensors checkpoint, or a "
            "hub id such as owner/name"
        )
    header = read_header(checkpoint)
    shapes = {name: parameter.shape for name, parameter in header.items()}
    family = families.detect_checkpoint(shapes)
    if family is None:
        raise UnsupportedError(f"{checkpoint} {_describe(header)}: give one of {known_families()}")
    return family


def _folder_bytes(checkpoint: Path) -> int:
    """What the converted folder needs: fp8 weights become twice as large."""
    eight_bits = sum(
        math.prod(parameter.shape)
        for parameter in read_header(checkpoint).values()
        if parameter.dtype.startswith("fp8")
    )
    return checkpoint.stat().st_size + eight_bits


def _describe(header: Mapping[str, Parameter]) -> str:
    """Say what a file that is no known checkpoint is, where its names tell."""
    for piece, pattern in _PIECES.items():
        find = pattern.search if piece == "a LoRA" else pattern.match
        if any(map(find, header)):
            return f"holds {piece} and no whole model"
    looked_for = "; ".join(text for name, text in _LOOKED_FOR.items() if name in families.FAMILIES)
    bare = [name.removeprefix("model.diffusion_model.") for name in header]
    seen = Counter(name.partition(".")[0] for name in bare).most_common(5)
    names = ", ".join(f"{stem}.* ({count})" if count > 1 else stem for stem, count in seen)
    return (
        f"is of a family that kiln does not know{_guess(header)} (looked for {looked_for}; its "
        f"{len(header)} tensors are {names or 'none'})"
    )


def _guess(header: Mapping[str, Parameter]) -> str:
    """diffusers' name of the model, which for what it doesn't know is "v1"."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    try:
        name = infer_diffusers_model_type(header)
    except (LookupError, NameError):  # parts of a model, which it doesn't expect
        return ""
    return "" if name == "v1" else f", {name} in diffusers' words"
