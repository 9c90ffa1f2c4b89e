"""The forms "before" and "after" of a VAE's half: its two parts, for pictures in seamless tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from optimizer.families.parts import floats
from optimizer.forms import save_form
from optimizer.job import Job
from optimizer.onnx_files import read_graph
from optimizer.tile_graph import cut_after, cut_before
from runners.part_names import AFTER, BEFORE
from runners.signature import Dim, Signature, TensorSpec
from runners.vae_parts import part_norms

__all__ = ["part_signatures", "prepare_tiles"]

Config = Mapping[str, Any]


def prepare_tiles(module: nn.Module, job: Job, out: Path, *, with_graph: bool) -> None:
    """Add both parts to what is prepared in `out`; `module` is an AutoencoderKL with the job's half
    alone.
    """
    config: Any = module.config
    half: Literal["decoder", "encoder"] = "decoder" if _decodes(job) else "encoder"
    norms = {name: len(found) for name, found in part_norms(getattr(module, half)).items()}
    for name, signature in part_signatures(job, config, norms=norms).items():
        model = read_graph(out / "model.onnx") if with_graph else None
        if model is not None and name == BEFORE:
            cut_before(model, half, signature)
        elif model is not None:
            cut_after(model, half, signature, factor=1 if _decodes(job) else _factor(config))
        save_form(name, signature, out, model)


def part_signatures(job: Job, config: Config, *, norms: Mapping[str, int]) -> dict[str, Signature]:
    """Of a half's parts, which take one tile of one picture; `norms`: how many each of them has.

    What is taken and given between them is [1, channels, height/f, width/f]; what tiles take
    beside is said in runners.vae_parts.
    """
    plain, factor = job.signature, _factor(config)
    channels = int(config["block_out_channels"][-1])
    dims = tuple(plain.dim(side) for side in _SIDES)
    latent_dims, sides, made = dims, _SIDES, plain.outputs[0].axes[2:]
    more: tuple[Dim, ...] = ()
    if not _decodes(job):
        latent_dims = tuple(_part(dim, factor, dim.name) for dim in dims)
        sides = ("rows", "columns")
        more = tuple(
            _part(dim, factor, name, of=dim.name) for dim, name in zip(dims, sides, strict=True)
        )

    def maps(names: tuple[str, ...], axes: Sequence[int | str]) -> tuple[TensorSpec, ...]:
        return tuple(floats(name, 1, channels, *axes) for name in names)

    def statistics(name: str, part: str) -> TensorSpec:
        return floats(name, norms[part], 2, int(config["norm_num_groups"]))

    def beside(part: str, axes: Sequence[str]) -> tuple[TensorSpec, ...]:
        rows, columns = (floats(n, axis) for n, axis in zip(("rows", "columns"), axes, strict=True))
        return rows, columns, floats("own", 1), statistics("given", part)

    given = _SIDES if _decodes(job) else made
    return {
        BEFORE: Signature(
            inputs=(_alone(plain.inputs[0]), *beside(BEFORE, sides)),
            outputs=(*maps(_BETWEEN, given), statistics("seen", BEFORE)),
            dims=(*dims, *more),
        ),
        AFTER: Signature(
            inputs=(*maps(("features", "attended"), _SIDES), *beside(AFTER, _SIDES)),
            outputs=(_alone(plain.outputs[0]), statistics("seen", AFTER)),
            dims=latent_dims,
        ),
    }


_SIDES = ("height", "width")
_BETWEEN = ("features", "query", "key", "value")
"""What the part before the attention gives."""


def _alone(spec: TensorSpec) -> TensorSpec:
    """Of one picture."""
    return spec.model_copy(update={"axes": (1, *spec.axes[1:])})


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
