"""Compiling repeated blocks once against compiling a component whole: time, speed and numbers.

What is measured has the depth and the kinds of blocks of the real denoisers at smaller widths, so
that both fit a desk's memory: time to compile grows with blocks, not with widths. Each way is built
in a process of its own, as `kiln compile` does: what is paid once in a process counts for both.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from optimizer.progress import Progress
from runners.console import Console
from runners.signature import Dim, Signature, TensorSpec

__all__ = ["MODELS", "build_one", "lines", "measure", "run_both"]

_BACKENDS = ("aoti-blocks", "aoti")
_ROUNDS = 9

_FLUX = {
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "in_channels": 64,
    "joint_attention_dim": 640,
    "num_attention_heads": 4,
    "num_layers": 19,
    "num_single_layers": 38,
    "pooled_projection_dim": 128,
}
"""All of FLUX.1's blocks, a sixth of its width."""

_UNET = {
    "attention_head_dim": 4,
    "block_out_channels": [64, 128, 128, 128],
    "cross_attention_dim": 96,
    "layers_per_block": 2,
    "sample_size": 32,
}
"""Stable Diffusion 1.5's blocks, a fifth of its widths or less."""


def _spec(name: str, *axes: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", axes=axes)


_BATCH = Dim(name="batch", min=1, opt=1, max=8)
_TOKENS = Dim(name="tokens", min=16, opt=77, max=512)

MODELS: dict[str, tuple[str, dict[str, Any], str, Signature]] = {
    "flux": (
        "FluxTransformer2DModel",
        _FLUX,
        "flux_transformer",
        Signature(
            inputs=(
                _spec("hidden_states", "batch", "sequence", 64),
                _spec("encoder_hidden_states", "batch", "tokens", 640),
                _spec("pooled_projections", "batch", 128),
                _spec("time_features", "batch", 256),
                _spec("img_rope", "sequence", 256),
                _spec("txt_rope", "tokens", 256),
            ),
            outputs=(_spec("out", "batch", "sequence", 64),),
            dims=(_BATCH, Dim(name="sequence", min=16, opt=1024, max=4096), _TOKENS),
        ),
    ),
    "unet": (
        "UNet2DConditionModel",
        _UNET,
        "unet",
        Signature(
            inputs=(
                _spec("sample", "batch", 4, "height", "width"),
                _spec("time_features", "batch", 64),
                _spec("encoder_hidden_states", "batch", "tokens", 96),
            ),
            outputs=(_spec("out_sample", "batch", 4, "height", "width"),),
            dims=(
                _BATCH,
                Dim(name="height", min=16, opt=48, max=64),
                Dim(name="width", min=16, opt=48, max=64),
                _TOKENS,
            ),
        ),
    ),
}
"""Name -> diffusers class, its config, its wrapper, and how it is called."""


def measure(console: Console, _out: Path) -> dict[str, Any]:
    """Every model of `MODELS`, each stage in a process of its own."""
    import psutil

    from optimizer.worker import run_stage

    threads = psutil.cpu_count(logical=False) or 1
    found = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as private:
            for backend in _BACKENDS:
                with console.stage(f"Compile {name} by {backend}") as stage:
                    arguments: tuple[Any, ...] = (name, backend, threads, Path(private))
                    target = "benchmarks.regional:build_one"
                    run_stage(target, arguments, progress=stage.progress)
            with console.stage(f"Run {name} in both ways") as stage:
                arguments = (name, threads, Path(private))
                run_stage("benchmarks.regional:run_both", arguments, progress=stage.progress)
            found[name] = json.loads((Path(private) / "regional.json").read_text("utf-8"))
    return {"models": found}


def lines(found: Mapping[str, Any]) -> list[str]:
    """The lines that `kiln bench` prints."""
    said = ["AOTInductor, blocks compiled once against whole:"]
    for name, model in found["models"].items():
        whole, blocks = model["rows"]["aoti"], model["rows"]["aoti-blocks"]
        said.append(
            f"  {name:<6}{model['blocks']:>3} blocks: {blocks['build_seconds']} s of "
            f"{whole['build_seconds']} s ({model['build_ratio']}x), {blocks['ms']} ms a call of "
            f"{whole['ms']} ms ({model['speed_ratio']}x of the speed), {blocks['sqnr_db']} dB"
        )
    return said


def build_one(name: str, backend: str, threads: int, out: Path) -> None:
    """Write the package into a folder of `out`, and BACKEND.json: its row so far and what its
    engine is opened with. Seconds are also the processors', compilers included, which a busy
    machine changes less.
    """
    import torch

    from optimizer.backends import How, builder

    torch.set_num_threads(threads)
    cls, config, wrapper, signature = MODELS[name]
    source, folder = out / f"{backend}-source", out / backend
    source.mkdir()
    folder.mkdir()
    _write_source(_component(cls, config), source)
    how = How(backend, "fp32", "denoiser", wrapper, signature)
    start, before = time.perf_counter(), os.times()
    built = builder(backend).build(source, folder, how, lambda _done, _total: None)
    seconds, cpu = time.perf_counter() - start, sum(os.times()[:4]) - sum(before[:4])
    code = sum((folder / f).stat().st_size for r, f in built.files.items() if "package" in r)
    row = {"build_seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "code_bytes": code}
    document = {"row": row, "files": built.files, "properties": built.properties}
    (out / f"{backend}.json").write_text(json.dumps(document), "utf-8")


def run_both(name: str, threads: int, out: Path, progress: Progress) -> None:
    """Write regional.json into `out`: what `build_one` found, and milliseconds a call of each."""
    import torch

    torch.set_num_threads(threads)
    cls, config, wrapper, signature = MODELS[name]
    component = _component(cls, config)
    rows, engines = {}, {}
    for backend in _BACKENDS:
        document = json.loads((out / f"{backend}.json").read_text("utf-8"))
        rows[backend], engines[backend] = (
            document["row"],
            _engine(document, out, backend, signature),
        )
    found = {
        "parameters": sum(p.numel() for p in component.parameters()),
        "blocks": _block_count(component),
        "threads": threads,
        "rows": _timed(component, wrapper, signature, engines, rows, threads, progress),
    }
    whole, blocks = rows["aoti"], rows["aoti-blocks"]
    found["build_ratio"] = round(blocks["build_seconds"] / whole["build_seconds"], 3)
    found["cpu_ratio"] = round(blocks["cpu_seconds"] / whole["cpu_seconds"], 3)
    found["speed_ratio"] = round(whole["ms"] / blocks["ms"], 3)
    (out / "regional.json").write_text(json.dumps(found), "utf-8")


def _component(cls: str, config: dict[str, Any]) -> Any:
    """Seeded random weights."""
    import diffusers
    import torch

    torch.manual_seed(0)
    return getattr(diffusers, cls)(**config).eval()


def _write_source(component: Any, source: Path) -> None:
    """As the compile pipeline stores a component for its backends."""
    import safetensors.torch

    from runners.engines.eager import eager_state

    layers, state = eager_state(component)
    safetensors.torch.save_file(state, source / "weights.safetensors")
    (source / "layers.json").write_text(json.dumps(layers), "utf-8")
    document = {**component.config, "_class_name": type(component).__name__}
    (source / "config.json").write_text(json.dumps(document), "utf-8")


def _block_count(component: Any) -> int:
    names = {name for part in component.modules() for name in getattr(part, "_repeated_blocks", ())}
    return sum(type(part).__name__ in names for part in component.modules())


def _engine(document: dict[str, Any], out: Path, backend: str, signature: Signature) -> Any:
    from runners.engines import engine_class

    files = {r: bytearray((out / backend / f).read_bytes()) for r, f in document["files"].items()}
    return engine_class(backend)(
        files, signature=signature, properties=document["properties"], threads=1
    )


def _timed(
    component: Any,
    wrapper: str,
    signature: Signature,
    engines: dict[str, Any],
    rows: dict[str, dict[str, Any]],
    threads: int,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """The rows with times, all called in turn at the native size, and what each loses to eager."""
    import numpy as np
    import torch

    from optimizer.numerics import sqnr_db
    from runners.modules import WRAPPERS

    generator = np.random.default_rng(0)
    sizes = {dim.name: dim.opt for dim in signature.dims}
    feeds = {
        spec.name: generator.standard_normal(
            [sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes], np.float32
        )
        for spec in signature.inputs
    }
    module, inputs = WRAPPERS[wrapper](component), [torch.from_numpy(x) for x in feeds.values()]

    def eager() -> Any:
        with torch.inference_mode():
            return module(*inputs)[0].numpy()

    calls: dict[str, Callable[[], Any]] = {"eager": eager}
    for name, engine in engines.items():
        start = time.perf_counter()
        engine.threads = threads
        engine.__enter__()
        rows[name]["load_seconds"] = round(time.perf_counter() - start, 2)
        calls[name] = partial(_first_output, engine, feeds)
    wanted = eager()
    for name in engines:
        rows[name]["sqnr_db"] = round(sqnr_db([(wanted, calls[name]())]), 1)
    times = _interleaved(calls, progress)
    for engine in engines.values():
        engine.close()
    rows["eager"] = {}
    for name, ms in times.items():
        rows[name]["ms"] = ms
    return rows


def _first_output(engine: Any, feeds: Mapping[str, Any]) -> Any:
    return next(iter(engine(feeds).values()))


def _interleaved(calls: dict[str, Callable[[], Any]], progress: Progress) -> dict[str, float]:
    """Median milliseconds of each, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(_ROUNDS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_:
                times[name].append(time.perf_counter() - start)
        progress(round_, _ROUNDS)
    return {name: round(1000 * statistics.median(found), 2) for name, found in times.items()}
