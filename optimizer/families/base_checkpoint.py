"""What the single-file checkpoints of all families share: a file's parts -> a diffusers folder.

A part is one component. It is read, renamed, compared with what the component's module has, and
written, before the next one is read. Weights keep their type, except 8-bit floats, which become
bf16: nothing computes in them here, and diffusers folders don't hold them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.weights import Parameter, read_header
from profiles.errors import SpecError, UnsupportedError
from runners.console import Console

if TYPE_CHECKING:
    from torch import Tensor

    Weights = dict[str, Tensor]

__all__ = ["Config", "Part", "Shapes", "assets", "read", "shapes_of", "write_folder"]

Config = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
"""Every tensor of a file: its name and shape."""

_ASSETS = Path(__file__).parent / "assets"

_FP8 = ("fp8_e4m3", "fp8_e5m2")
_FLOATS = ("bf16", "fp16", "fp32", "fp64", *_FP8)

_LEFTOVERS = (
    "*.comfy_quant",
    "*.input_scale",
    "*.logit_scale",
    "*.position_ids",
    "*.scale_input",
    "*scaled_fp8",
    "alphas_cumprod*",
    "betas",
    "denoiser.*",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "model_ema.*",
    "posterior_*",
    "scale_factor",
    "sqrt_*",
    "v_pred",
    "ztsnr",
)
"""What training and other tools leave in files and no picture needs: averaged copies (EMA), tables
of the noise schedule, index buffers, and marks that are read elsewhere."""


@dataclass(frozen=True)
class Part:
    """One component of a checkpoint."""

    folder: str
    """Its diffusers folder."""
    title: str
    """What a sentence calls it."""
    prefixes: tuple[str, ...]
    """Beginnings of its tensors' names in the file."""
    rename: Callable[[Weights, Config], Weights]
    """The file's tensors and the component's config -> its tensors by its module's names.

    May take tensors out of the first: what stays there and shares no memory with the result counts
    as not understood."""
    leftovers: tuple[str, ...] = ()
    """fnmatch patterns of the file's names that this part has and nobody uses."""

    def owns(self, name: str) -> bool:
        """Whether the file's tensor of this name is one of the part's weights."""
        return name.startswith(self.prefixes) and not _matches(name, (*_LEFTOVERS, *self.leftovers))


def assets(name: str) -> Path:
    """The shipped folder of configs or vocabularies called `name`."""
    return _ASSETS / name


def shapes_of(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor of a file: its name and shape."""
    return {name: parameter.shape for name, parameter in read_header(checkpoint).items()}


def _change_config(file: Path, change: Mapping[str, Any]) -> None:
    config = {**json.loads(file.read_bytes()), **change}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")


def write_folder(
    checkpoint: Path,
    folder: Path,
    *,
    title: str,
    configs: Path,
    parts: Iterable[Part],
    changes: Mapping[str, Mapping[str, Any]],
    without: tuple[str, ...] = (),
) -> None:
    """Write a copy of `configs`, with `changes` (file -> values), and the weights of all `parts`.

    `without`: folders of the configs that aren't copied; `title`: the family's name in sentences.
    Raises `SpecError` where a part or a weight is missing, of another shape, or unknown;
    `UnsupportedError` for integer weights.
    """
    parts = tuple(parts)
    header = read_header(checkpoint)
    _check_header(checkpoint, header, title, parts)
    shutil.copytree(configs, folder, ignore=shutil.ignore_patterns(*without), dirs_exist_ok=True)
    for file, change in changes.items():
        _change_config(folder / file, change)
    for part in parts:
        _write_part(checkpoint, folder / part.folder, part)


def read(checkpoint: Path, *prefixes: str) -> Weights:
    """The tensors whose names begin with one of `prefixes`, mapped and not yet read from disk."""
    from safetensors import safe_open

    with safe_open(checkpoint, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefixes)]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_header(
    checkpoint: Path, header: Mapping[str, Parameter], title: str, parts: tuple[Part, ...]
) -> None:
    """Refuse what the names and types tell, and say what the conversion leaves out or changes."""
    absent = [part for part in parts if not any(map(part.owns, header))]
    if absent:
        missing = ", ".join(f"{part.title} ({part.prefixes[0]}*)" for part in absent)
        raise SpecError(
            f"{checkpoint} is {title} without {missing}: give a file that holds all parts, or the "
            "diffusers folder or hub id of the model"
        )
    owned = {name for name in header if any(part.owns(name) for part in parts)}
    scales = {name for name in owned if name.endswith(_SCALES)}
    types = {header[name].dtype for name in owned - scales}
    if types - {*_FLOATS}:
        raise UnsupportedError(
            f"{checkpoint} has weights of type {', '.join(sorted(types - {*_FLOATS}))}, quantized "
            "by another tool: give its 16-bit or fp8 version"
        )
    if count := sum(header[name].dtype in _FP8 for name in owned):
        Console().info(f"{checkpoint}: fp8 weights become bf16, twice as large ({count} tensors)")
    others = [name for name in header if name not in owned and not _is_leftover(name, parts)]
    if others:
        Console().info(
            f"{checkpoint}: what is no part of {title} is left out (tensors: {len(others)}, the "
            f"first is {others[0]})"
        )


def _is_leftover(name: str, parts: tuple[Part, ...]) -> bool:
    return _matches(name, _LEFTOVERS) or any(_matches(name, part.leftovers) for part in parts)


class _Gapless(dict[str, Any]):
    """Gives an empty tensor for an absent name, so that a converter finds all gaps, not the first.

    An empty tensor stays one when it is split or joined, and no weight is empty.
    """

    def __missing__(self, name: str) -> Tensor:
        import torch

        return torch.empty(0)

    def pop(self, name: str, *_: object) -> Any:
        return super().pop(name) if name in self else self[name]


def _write_part(checkpoint: Path, folder: Path, part: Part) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    source = _Gapless(_unscaled(checkpoint, read(checkpoint, *part.prefixes), part))
    expected = _expected_shapes(config)
    try:
        renamed = part.rename(source, config)
    except KeyError as error:  # a converter that takes some name for granted
        raise SpecError(_lacks(checkpoint, part, 1, len(expected), str(error.args[0]))) from error
    weights = {_saved_name(name, config): tensor for name, tensor in renamed.items()}
    wrong = [n for n, shape in expected.items() if n not in weights or weights[n].shape != shape]
    if wrong:
        raise SpecError(_lacks(checkpoint, part, len(wrong), len(expected), wrong[0]))
    used = {tensor.data_ptr() for tensor in weights.values()}
    unknown = [name for name, tensor in source.items() if tensor.data_ptr() not in used]
    unknown += [name for name in weights if name not in expected]
    if unknown:
        raise SpecError(
            f"{checkpoint} has weights in its {part.title} that the architecture has not "
            f"({len(unknown)}, the first is {unknown[0]}): it is another model; give its diffusers "
            "folder"
        )
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    _save({name: weights[name] for name in expected}, folder / f"{stem}.safetensors")


def _lacks(checkpoint: Path, part: Part, missing: int, expected: int, first: str) -> str:
    return (
        f"{checkpoint} lacks {missing} of the {expected} weights of its {part.title}, or has them "
        f"in another shape (the first is {part.folder}'s {first}): download it again, or give the "
        "diffusers folder of the model"
    )


_SCALES = (".scale_weight", ".weight_scale")


def _unscaled(checkpoint: Path, weights: Weights, part: Part) -> Weights:
    """The part's weights, those with a scale beside them multiplied by it.

    ComfyUI's scaled fp8 files have X.scale_weight (X.weight_scale since late 2025), one fp32 number
    for X.weight.
    """
    import torch

    kept = {n: tensor for n, tensor in weights.items() if part.owns(n) and not n.endswith(_SCALES)}
    for name in (name for name in weights if name.endswith(_SCALES)):
        target, scale = name.rpartition(".")[0] + ".weight", weights[name]
        if target not in kept or scale.numel() != 1:
            raise UnsupportedError(
                f"{checkpoint} has a scale {name} of shape {tuple(scale.shape)}, and kiln knows "
                "one number a weight: give the 16-bit version of the model"
            )
        kept[target] = (kept[target].float() * scale.float()).to(torch.bfloat16)
    return kept


def _saved_name(name: str, config: Config) -> str:
    """transformers 5 dropped "text_model." from CLIPTextModel; it reads both, and hubs have it."""
    if config.get("model_type") != "clip_text_model" or name.startswith("text_projection"):
        return name
    return f"text_model.{name.removeprefix('text_model.')}"


def _expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return what the component's module has, built without memory for its weights."""
    from runners.modules import component_from_config

    module = component_from_config(config)
    tied = set(getattr(module, "_tied_weights_keys", None) or ())
    return {
        _saved_name(name, config): tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if name not in tied
    }


def _save(weights: Weights, path: Path) -> None:
    """Write a .safetensors file one tensor after another.

    Not with the library's save_file, which needs all tensors at once: 24 GB for FLUX.1's
    transformer made bf16 of fp8.
    """
    import torch

    fp8 = (torch.float8_e4m3fn, torch.float8_e5m2)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in weights.items():
        dtype = torch.bfloat16 if tensor.dtype in fp8 else tensor.dtype
        begin, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {
            "dtype": _CODES[str(dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in weights.values():
            plain = tensor.to(torch.bfloat16) if tensor.dtype in fp8 else tensor
            file.write(plain.contiguous().reshape(-1).view(torch.uint8).numpy().data)


_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
"""torch's types by the format's names."""
