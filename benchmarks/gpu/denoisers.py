"""Full-size denoisers of seeded random weights on a card: eager, JIT and ahead of time.

What a contestant computes is compared with eager before it is timed; one that is wrong gets no
time. Speed is read against the machine's own: FLOPs counted on the meta device, over the best
matrix product that is measured in the same process.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.full_models import SD15_UNET, SDXL_UNET
from benchmarks.gpu.roofline import flops_of, peak_flops
from benchmarks.gpu.rounding import round_linears
from optimizer.backends.aoti import SETTINGS, Typed, compile_package, exported, sized_inputs
from optimizer.backends.aoti_blocks import export_block, find_kinds, watch_calls
from optimizer.backends.aoti_cuda import CARD_SETTINGS
from optimizer.numerics import sqnr_db
from runners.engines.aoti_blocks import insert_blocks
from runners.engines.aoti_package import Package, tensor_facts
from runners.engines.replaying import Replaying
from runners.lowered import card_product, lower_layers
from runners.modules import WRAPPERS, component_from_config
from runners.signature import Dim, Signature, TensorSpec

__all__ = ["DENOISERS", "ROWS", "Denoiser", "measure_denoiser"]

Call = Callable[[], Any]

ROWS = ("eager", "torch.compile", "aoti", "aoti int8", "aoti fp8")
"""Contestants, in the order in which they are made."""
_SECONDS = 390.0
"""After which no further contestant is begun: a section takes under 8 minutes."""
_LEAST_DB = {"none": 25.0, "int8": 10.0, "fp8": 10.0}
"""To eager bf16, which itself loses 36 to 39 dB (FACTS: whole UNets); rounded random weights have
no outliers to keep and no structure to spare: far below, something is wrong."""


@dataclass(frozen=True)
class Denoiser:
    """One architecture at its native size, and a small one of the same kinds of blocks."""

    cls: str
    wrapper: str
    config: Mapping[str, Any]
    small: Mapping[str, Any]
    inputs: Mapping[str, tuple[int | str, ...]]
    """Input -> its axes: dims of `sizes`, entries of the config (dotted by index), numbers."""
    sizes: Mapping[str, int]
    small_sizes: Mapping[str, int]
    in_blocks: bool
    """Whether its repeated blocks are compiled once."""


_UNET_INPUTS: dict[str, tuple[int | str, ...]] = {
    "sample": ("batch", 4, "height", "width"),
    "time_features": ("batch", "block_out_channels.0"),
    "encoder_hidden_states": ("batch", "tokens", "cross_attention_dim"),
}
_FLUX_CONFIG: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
"""FLUX.1-dev's transformer/config.json: 11.9 billion parameters."""

DENOISERS = {
    "sd15": Denoiser(
        "UNet2DConditionModel",
        "unet",
        SD15_UNET,
        {**SD15_UNET, "block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 32},
        _UNET_INPUTS,
        {"batch": 2, "height": 64, "width": 64, "tokens": 77},
        {"batch": 2, "height": 16, "width": 16, "tokens": 8},
        in_blocks=False,
    ),
    "sdxl": Denoiser(
        "UNet2DConditionModel",
        "unet",
        SDXL_UNET,
        {
            **SDXL_UNET,
            "block_out_channels": [32, 64, 64],
            "transformer_layers_per_block": [1, 1, 2],
            "attention_head_dim": [2, 4, 4],
            "cross_attention_dim": 32,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
        {
            **_UNET_INPUTS,
            "text_embeds": ("batch", "pooled"),
            "size_features": ("batch", "size_features"),
        },
        {
            **{"batch": 2, "height": 128, "width": 128, "tokens": 77},
            **{"pooled": 1280, "size_features": 1536},
        },
        {
            **{"batch": 2, "height": 16, "width": 16, "tokens": 8},
            **{"pooled": 32, "size_features": 48},
        },
        in_blocks=True,
    ),
    "flux": Denoiser(
        "FluxTransformer2DModel",
        "flux_transformer",
        _FLUX_CONFIG,
        {
            **_FLUX_CONFIG,
            **{"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16},
            **{"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16},
            "axes_dims_rope": [4, 6, 6],
        },
        {
            "hidden_states": ("batch", "sequence", "in_channels"),
            "encoder_hidden_states": ("batch", "tokens", "joint_attention_dim"),
            "pooled_projections": ("batch", "pooled_projection_dim"),
            "time_features": ("batch", 256),
            "img_rope": ("sequence", "rope"),
            "txt_rope": ("tokens", "rope"),
            "guidance_features": ("batch", 256),
        },
        {"batch": 1, "sequence": 4096, "tokens": 512, "rope": 256},
        {"batch": 1, "sequence": 64, "tokens": 16, "rope": 32},
        in_blocks=True,
    ),
}
_DYNAMIC = ("batch", "height", "width", "sequence", "tokens")


def measure_denoiser(
    name: str, rows: tuple[str, ...], timed: Callable[[dict[str, Call]], Any], *, small: bool
) -> dict[str, Any]:
    """One section's answer: correctness, then times and memory, then the share of the peak."""
    begun = time.monotonic()
    known = DENOISERS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, sizes = (known.small, known.small_sizes) if small else (known.config, known.sizes)
    signature = _signature(known, config, sizes)
    inputs = sized_inputs(signature, {dim.name: dim.opt for dim in signature.dims}, device)
    calls: dict[str, Call] = {}
    checked: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as private:
        wanted = None
        for number, row in enumerate(row for row in ROWS if row in rows):
            if time.monotonic() - begun > _SECONDS:
                checked[row] = {"left_out": "no time was left for it"}
                continue
            start = time.monotonic()
            try:
                call = _contestant(row, known, config, signature, Path(private) / f"{number}.pt2")
                found = call(*inputs)[0].float().cpu().numpy()
            except Exception as error:  # what fails is an answer too
                checked[row] = {"failed": str(error).strip().splitlines()[0]}
                continue
            wanted = found if wanted is None else wanted
            db = sqnr_db([(wanted, found)])
            needed = _LEAST_DB[row.partition(" ")[2] or "none"]
            checked[row] = {
                "ready_seconds": round(time.monotonic() - start, 1),
                "sqnr_db": round(db, 1),
                "needed_db": needed,
            }
            if db >= needed:
                calls[row] = partial(call, *inputs)
        times = timed(calls)
    meta = Typed(WRAPPERS[known.wrapper](_empty(known, config)), torch.float32)
    flops, peak = flops_of(meta, inputs), peak_flops(device)
    return {
        "parameters": sum(p.numel() for p in _empty(known, config).parameters()),
        "sizes": dict(sizes),
        "dtype": "bf16",
        "checked": checked,
        **times,
        "tflops": round(flops / 1e12, 6),
        "peak_tflops_per_second": round(peak / 1e12, 3),
        "share_of_peak": {
            row: round(flops / (ms / 1000) / peak, 4) for row, ms in times["ms"].items()
        },
    }


def _signature(known: Denoiser, config: Mapping[str, Any], sizes: Mapping[str, int]) -> Signature:
    """The sizes as dims that may halve and, batches aside, double."""

    def axis(name: int | str) -> int | str:
        if isinstance(name, int) or name in _DYNAMIC:
            return name
        if name in sizes:
            return sizes[name]
        entry, _, index = name.partition(".")
        return int(config[entry][int(index)] if index else config[entry])

    inputs = tuple(
        TensorSpec(name=name, dtype="float32", axes=tuple(axis(one) for one in axes))
        for name, axes in known.inputs.items()
    )
    dims = tuple(
        Dim(name=name, min=1 if name == "batch" else max(2, size // 2), opt=size, max=2 * size)
        for name, size in sizes.items()
        if name in _DYNAMIC
    )
    return Signature(inputs=inputs, outputs=(), dims=dims)


def _empty(known: Denoiser, config: Mapping[str, Any]) -> nn.Module:
    return component_from_config({**config, "_class_name": known.cls})


def _seeded(known: Denoiser, config: Mapping[str, Any], device: str) -> nn.Module:
    """The component in bf16: matrices that keep their inputs' size, norms of one, no biases."""
    component = _empty(known, config).to(torch.bfloat16).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in component.named_parameters():
        if tensor.dim() > 1:
            fan_in = tensor[0].numel()
            tensor.data.normal_(0, fan_in**-0.5, generator=generator)
        else:
            tensor.data.fill_(1.0 if name.endswith("weight") else 0.0)
    return component.eval().requires_grad_(requires_grad=False)


def _contestant(
    row: str, known: Denoiser, config: Mapping[str, Any], signature: Signature, path: Path
) -> Callable[..., Any]:
    """What runs the denoiser in one of the ways."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    component = _seeded(known, config, device)
    module = Typed(WRAPPERS[known.wrapper](component), torch.bfloat16).eval()
    how = row.partition(" ")[2]
    if how:
        inputs = sized_inputs(signature, {dim.name: dim.opt for dim in signature.dims}, device)
        round_linears(component, how, lambda: module(*inputs))
        lower_layers(component, card_product)
    if row == "eager":
        return torch.inference_mode()(module)
    if row == "torch.compile":
        mode = "max-autotune" if device == "cuda" else "default"
        return torch.inference_mode()(torch.compile(module, mode=mode))
    build = _in_blocks if known.in_blocks else _whole
    call = torch.inference_mode()(build(module, signature, path, device))
    if device == "cpu":
        return call
    names = [spec.name for spec in signature.inputs]
    replaying = Replaying(call)
    return lambda *inputs: replaying(dict(zip(names, inputs, strict=True)))


def _settings(device: str) -> dict[str, Any]:
    if device == "cuda":
        return CARD_SETTINGS
    return {**SETTINGS, "aot_inductor.package_constants_in_so": False}


def _whole(module: Typed, signature: Signature, path: Path, device: str) -> Callable[..., Any]:
    program = exported(module, signature, device)
    compile_package(program, path, _settings(device))
    package = Package(path.read_bytes(), single_threaded=True)
    named = {**program.state_dict, **program.constants}
    tensors: dict[str, Tensor] = {n: t for n, t in named.items() if isinstance(t, Tensor)}
    package.give(tensors, {name: tensor_facts(tensor) for name, tensor in tensors.items()})
    return package


def _in_blocks(module: Typed, signature: Signature, path: Path, device: str) -> Callable[..., Any]:
    kinds = find_kinds(module)
    watch_calls(module, kinds, signature, device)
    packages = []
    for number, kind in enumerate(kinds):
        one = path.with_name(f"{path.stem}-{number}.pt2")
        compile_package(export_block(module, kind), one, _settings(device))
        packages.append(Package(one.read_bytes(), single_threaded=True))
        kind.calls.clear()
    insert_blocks(module.wrapper, [kind.document("package") for kind in kinds], packages)
    return module
