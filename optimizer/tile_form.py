"""The forms "whole" and "tile" of a VAE's half: its two parts, for pictures in seamless tiles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from optimizer.families.parts import floats
from optimizer.forms import save_form
from optimizer.job import Job
from optimizer.onnx_files import read_graph
from optimizer.tile_graph import cut_tile, cut_whole
from runners.part_names import TILE, WHOLE
from runners.signature import Dim, Signature
from runners.vae_parts import tile_norms

__all__ = ["part_signatures", "prepare_tiles"]

Config = Mapping[str, Any]


def prepare_tiles(module: nn.Module, job: Job, out: Path, *, with_graph: bool) -> None:
    """Add both parts to what is prepared in `out`; `module` is an AutoencoderKL with the job's half
    alone.
    """
    config: Any = module.config
    half: Literal["decoder", "encoder"] = "decoder" if _decodes(job) else "encoder"
    signatures = part_signatures(job, config, norms=len(tile_norms(module)))
    for name, signature in signatures.items():
        model = read_graph(out / "model.onnx") if with_graph else None
        if model is not None and name == WHOLE:
            cut_whole(model, half, signature, factor=_factor(config))
        elif model is not None:
            cut_tile(model, half, signature)
        save_form(name, signature, out, model)


def part_signatures(job: Job, config: Config, *, norms: int) -> dict[str, Signature]:
    """Of a half's parts: the whole picture's takes any batch, the tiles' one tile of one picture.

    `features`: [batch, channels, height/f, width/f]; what tiles take beside is said in
    runners.vae_parts.
    """
    plain, factor = job.signature, _factor(config)
    channels, groups = int(config["block_out_channels"][-1]), int(config["norm_num_groups"])
    sides = ("height", "width")
    if _decodes(job):
        latents, whole_dims = sides, plain.dims
        tile_dims = tuple(plain.dim(side) for side in sides)
    else:
        latents = ("rows", "columns")
        tile_dims = (
            *(plain.dim(side) for side in sides),
            *(
                _part(plain.dim(s), factor, name, of=s)
                for s, name in zip(sides, latents, strict=True)
            ),
        )
        whole_dims = (plain.dim("batch"), *(_part(plain.dim(s), factor, s) for s in sides))
    features = floats("features", "batch", channels, *sides)
    tile_features = floats("features", 1, channels, *sides)
    made = plain.outputs[0].model_copy(update={"axes": (1, *plain.outputs[0].axes[1:])})
    taken = plain.inputs[0].model_copy(update={"axes": (1, *plain.inputs[0].axes[1:])})
    statistics = (norms, 2, groups)
    beside = (
        floats("rows", latents[0]),
        floats("columns", latents[1]),
        floats("own", 1),
        floats("given", *statistics),
    )
    seen = floats("seen", *statistics)
    if _decodes(job):
        return {
            WHOLE: Signature(inputs=plain.inputs, outputs=(features,), dims=whole_dims),
            TILE: Signature(inputs=(tile_features, *beside), outputs=(made, seen), dims=tile_dims),
        }
    out_features = floats("features", 1, channels, *plain.outputs[0].axes[2:])
    return {
        WHOLE: Signature(inputs=(features,), outputs=plain.outputs, dims=whole_dims),
        TILE: Signature(inputs=(taken, *beside), outputs=(out_features, seen), dims=tile_dims),
    }


def _decodes(job: Job) -> bool:
    return job.spec.role == "vae_decoder"


def _factor(config: Config) -> int:
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _part(dim: Dim, per: int, name: str, of: str | None = None) -> Dim:
    """A side in latents, of one in pixels."""
    low, opt, high = (-(-value // per) for value in (dim.min, dim.opt, dim.max))
    if of is not None:
        return Dim(name=name, min=low, opt=opt, max=high, of=of, per=per)
    step = max(1, dim.multiple_of // per)
    return Dim(name=name, min=low, opt=opt, max=high, multiple_of=step)
