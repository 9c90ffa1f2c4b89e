"""Stable Diffusion 1.5's UNet at full size, random weights: kiln's int8 against its peers.

Everything runs in one process, interleaved, on the same inputs: latents of 512x512 pixels, a batch
of two (guidance). Weights are random, so speed and bytes are the real ones and SQNR is only
comparable between the rows.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.full_models import SD15_UNET
from optimizer.backends import BACKENDS
from optimizer.calls import Call, load_calls, save_calls
from optimizer.numerics import sqnr_db
from optimizer.progress import Progress, Steps
from optimizer.sizes import predicted_bytes

__all__ = [
    "build_graph",
    "compare_engines",
    "make_graph",
    "make_nncf",
    "make_ours",
    "make_plain",
    "make_weights",
    "quantize",
]

_CALIBRATION, _HELD_OUT = 6, 2
_ROUNDS = 6


def make_weights(out: Path, progress: Progress) -> None:
    """Write unet/ (fp32, seed 0) and calls.safetensors with fp32 outputs of the held-out calls."""
    import numpy as np
    import torch
    from diffusers import UNet2DConditionModel

    from optimizer.prepare import run_module
    from runners.modules import WRAPPERS

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SD15_UNET).eval()
    unet.save_pretrained(out / "unet")
    wrapper = WRAPPERS["unet"](unet)
    generator = np.random.default_rng(0)
    calls = {}
    for index in range(_CALIBRATION + _HELD_OUT):
        call = _random_call(generator, 960.0 - 120 * index)
        calls[f"{index:02}"] = run_module(wrapper, call) if index >= _CALIBRATION else call
        progress(index + 1, _CALIBRATION + _HELD_OUT)
    save_calls(calls, out / "calls.safetensors")


def _random_call(generator: Any, timestep: float) -> Call:
    import numpy as np
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    waves = get_timestep_embedding(
        torch.full((2,), timestep),
        SD15_UNET["block_out_channels"][0],
        flip_sin_to_cos=True,
        downscale_freq_shift=0,
    )
    return Call(
        (
            generator.standard_normal((2, 4, 64, 64), dtype=np.float32),
            waves.numpy(),
            generator.standard_normal((2, 77, 768), dtype=np.float32),
        ),
        (),
    )


def quantize(model: Path, how: tuple[str, str, int], out: Path, progress: Progress) -> None:
    """Write quantized.json: what quantizing takes, with a level, a solver and calibration steps.

    The seconds hold calibration and solving, the peak the whole process, fp32 weights included.
    """
    import numpy as np

    from benchmarks.compare_worker import peak_rss_bytes
    from optimizer.families.sd1 import SD1
    from optimizer.prepare import run_module
    from optimizer.quantize.apply import planned_layers, quantizable_layers, quantized_layers
    from optimizer.quantize.covariance import observing_covariance
    from optimizer.quantize.observe import observing
    from optimizer.quantize.policy import default_policy
    from runners.quantized import insert_quantized

    quant, solver, runs = how
    start = time.monotonic()
    unet, wrapper = _loaded(model)
    layers, spec = quantizable_layers(unet), SD1.component("unet")
    schemes = planned_layers(unet, default_policy(quant, spec, solver))
    steps = Steps(progress, runs + len(schemes))
    generator = np.random.default_rng(1)
    wanted = layers if runs else {}
    with (
        observing(unet, wanted, spec.factors) as found,
        observing_covariance(unet, wanted if solver == "gptq" else {}) as covariances,
    ):
        for index in range(runs):
            run_module(wrapper, _random_call(generator, 990.0 - 960.0 * index / runs))
            steps.advance()
    for name, covariance in covariances.items():
        found[name].covariance = partial(getattr, covariance, "mean")
    insert_quantized(unet, quantized_layers(unet, schemes, found, solver, steps.advance))
    seconds, peak = time.monotonic() - start, peak_rss_bytes()
    calls = _held_out(load_calls(model / "calls.safetensors"))
    total = 4 * sum(math.prod(shape) for shape in _shapes(model).values())
    stored = predicted_bytes(_shapes(model), schemes, 2, BACKENDS["openvino"])
    document = {
        "calibration_steps": runs,
        "seconds": round(seconds, 1),
        "peak_rss_bytes": peak,
        "peak_vs_fp32": None if peak is None else round(peak / total, 2),
        "bytes_vs_fp32": round(stored / total, 4),
        "sqnr_db": round(
            sqnr_db((c.outputs[0], run_module(wrapper, c).outputs[0]) for c in calls), 2
        ),
    }
    (out / "quantized.json").write_text(json.dumps(document), "utf-8")


def _shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Of all parameters, from the files' headers."""
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in (model / "unet").glob("*.safetensors"):
        with safe_open(path, "np") as reader:
            found |= {
                name: tuple(reader.get_slice(name).get_shape())
                for name in reader.keys()  # noqa: SIM118 (it isn't a mapping)
            }
    return found


def make_ours(model: Path, quant: str, out: Path) -> None:
    """Quantize with kiln's default policy, export, build for both runtimes; also info.json."""
    from optimizer.backends import onnxruntime as other
    from optimizer.backends import openvino as builder
    from optimizer.families.sd1 import SD1
    from optimizer.prepare import run_module
    from optimizer.quantize.apply import planned_layers, quantizable_layers, quantized_layers
    from optimizer.quantize.observe import observing
    from optimizer.quantize.policy import default_policy
    from runners.quantized import insert_quantized

    start = time.monotonic()
    unet, wrapper = _loaded(model)
    calls = load_calls(model / "calls.safetensors")
    spec = SD1.component("unet")
    schemes = planned_layers(unet, default_policy(quant, spec))
    with observing(unet, quantizable_layers(unet), spec.factors) as found:
        for call in _part(calls, held_out=False):
            run_module(wrapper, call)
    insert_quantized(unet, quantized_layers(unet, schemes, found, "mse"))
    seconds = time.monotonic() - start
    oracle = sqnr_db((c.outputs[0], run_module(wrapper, c).outputs[0]) for c in _held_out(calls))
    _export(wrapper, calls, out)
    (out / "engine").mkdir()
    builder.build(out, out / "engine", _how("openvino", "bf16"), _quiet)
    (out / "engine-onnxruntime").mkdir()
    other.build(out, out / "engine-onnxruntime", _how("onnxruntime", "fp32"), _quiet)
    info = {"quantize_seconds": round(seconds, 1), "oracle_sqnr_db": round(oracle, 2)}
    (out / "info.json").write_text(json.dumps(info), "utf-8")


def make_graph(model: Path, quant: str, backend: str, out: Path) -> None:
    """Quantize as the backend can have it, with MSE clipping, and export: model.onnx, job.json."""
    from optimizer.families.sd1 import SD1
    from optimizer.prepare import run_module
    from optimizer.quantize.apply import planned_layers, quantizable_layers, quantized_layers
    from optimizer.quantize.observe import observing
    from optimizer.quantize.policy import default_policy, legal_policy
    from runners.quantized import insert_quantized

    unet, wrapper = _loaded(model)
    calls = load_calls(model / "calls.safetensors")
    spec = SD1.component("unet")
    policy = legal_policy(default_policy(quant, spec), BACKENDS[backend])
    schemes = planned_layers(unet, policy)
    if schemes:
        with observing(unet, quantizable_layers(unet), spec.factors) as found:
            for call in _part(calls, held_out=False):
                run_module(wrapper, call)
        insert_quantized(unet, quantized_layers(unet, schemes, found, "mse"))
    _export(wrapper, calls, out)
    job = {
        "layers": len(schemes),
        "predicted_bytes": predicted_bytes(_shapes(model), schemes, 2, BACKENDS[backend]),
    }
    (out / "job.json").write_text(json.dumps(job), "utf-8")


def build_graph(
    prepared: Path, backend: str, capabilities: tuple[str, ...], out: Path, progress: Progress
) -> None:
    """Build an fp16 engine in a process of its own; built.json: time, memory, bytes, kernels."""
    from benchmarks.compare_worker import peak_rss_bytes
    from optimizer.backends import How, builder

    how = How(backend, "fp16", "denoiser", "unet", _signature(), capabilities=capabilities)
    start = time.monotonic()
    built = builder(backend).build(prepared, out, how, progress)
    document = {
        "seconds": round(time.monotonic() - start, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "bytes": sum((out / name).stat().st_size for name in built.files.values()),
        "layers_low_bit": built.low_bit_layers,
        **json.loads((prepared / "job.json").read_text("utf-8")),
    }
    document["bytes_vs_predicted"] = round(document["bytes"] / document["predicted_bytes"], 4)
    (out / "built.json").write_text(json.dumps(document), "utf-8")


def make_plain(model: Path, out: Path) -> None:
    """Export without quantization: model.onnx, and an OpenVINO engine for bf16 in engine/."""
    from optimizer.backends import openvino as builder

    _, wrapper = _loaded(model)
    _export(wrapper, load_calls(model / "calls.safetensors"), out)
    (out / "engine").mkdir()
    builder.build(out, out / "engine", _how("openvino", "bf16"), _quiet)


def make_nncf(model: Path, plain: Path, out: Path) -> None:
    """The peer: NNCF's own int8 post-training quantization of the plain export, same inputs."""
    import nncf
    import openvino as ov

    from optimizer.backends import openvino as builder

    start = time.monotonic()
    calls = load_calls(model / "calls.safetensors")
    signature = _signature()
    feeds = [call.feeds(signature) for call in _part(calls, held_out=False)]
    quantized = nncf.quantize(
        ov.Core().read_model(plain / "model.onnx"),
        nncf.Dataset(feeds),
        subset_size=len(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    seconds = time.monotonic() - start
    (out / "engine").mkdir()
    builder.save(quantized, out / "engine", dtype="bf16")
    info = {"quantize_seconds": round(seconds, 1), "nncf": nncf.__version__}
    (out / "info.json").write_text(json.dumps(info), "utf-8")


def compare_engines(folders: dict[str, Path], threads: int, out: Path) -> None:
    """Time all contestants in turn and write rows.json: medians, speed-up, SQNR, bytes."""
    import torch

    torch.set_num_threads(threads)
    calls = _held_out(load_calls(folders["weights"] / "calls.safetensors"))
    contestants = _contestants(folders, threads)
    rows: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for name, run in contestants.items():  # the first call selects kernels and isn't timed
        rows[name] = {"sqnr_db": round(sqnr_db((c.outputs[0], run(c)) for c in calls), 2)}
    for _ in range(_ROUNDS):
        for name, run in contestants.items():
            start = time.perf_counter()
            run(calls[0])
            times[name].append(time.perf_counter() - start)
    base = statistics.median(times["diffusers eager fp32"])
    for name, found in times.items():
        median = statistics.median(found)
        rows[name].update(seconds=round(median, 4), speedup=round(base / median, 3))
        rows[name]["spread"] = round((max(found) - min(found)) / median, 3)
    for name, engine in (
        ("kiln int8", folders["ours"] / "engine"),
        ("kiln int8 on ONNX Runtime", folders["ours"] / "engine-onnxruntime"),
        ("NNCF int8", folders["nncf"] / "engine"),
        ("kiln bf16", folders["plain"] / "engine"),
    ):
        rows[name]["bytes"] = sum(path.stat().st_size for path in engine.iterdir())
        info = engine.with_name("info.json")
        rows[name] |= json.loads(info.read_text("utf-8")) if info.is_file() else {}
    (out / "rows.json").write_text(json.dumps(rows), "utf-8")


def _contestants(folders: dict[str, Path], threads: int) -> dict[str, Callable[[Call], Any]]:
    import onnxruntime as ort
    import torch

    from optimizer.prepare import run_module

    signature = _signature()
    _, wrapper = _loaded(folders["weights"])
    _, narrow = _loaded(folders["weights"])
    narrow.to(torch.bfloat16)

    @torch.inference_mode()
    def eager_bf16(call: Call) -> Any:
        inputs = (torch.from_numpy(array).bfloat16() for array in call.inputs)
        return narrow(*inputs)[0].float().numpy()

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def session(path: Path) -> Callable[[Call], Any]:
        opened = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda call: opened.run(None, call.feeds(signature))[0]

    def engine(stage: str) -> Callable[[Call], Any]:
        opened = _open_engine(folders[stage] / "engine", threads)
        return lambda call: opened(call.feeds(signature))["out_sample"]

    return {
        "diffusers eager fp32": lambda call: run_module(wrapper, call).outputs[0],
        "diffusers eager bf16": eager_bf16,
        "ONNX Runtime fp32": session(folders["plain"] / "model.onnx"),
        "kiln int8 on ONNX Runtime": session(folders["ours"] / "engine-onnxruntime" / "model.onnx"),
        "kiln bf16": engine("plain"),
        "kiln int8": engine("ours"),
        "NNCF int8": engine("nncf"),
    }


def _open_engine(folder: Path, threads: int) -> Any:
    from optimizer.backends.openvino import FILES, properties
    from runners.engines.openvino import OpenVinoEngine

    files = {role: bytearray((folder / name).read_bytes()) for role, name in FILES.items()}
    engine = OpenVinoEngine(
        files, signature=_signature(), properties=properties("bf16"), threads=threads
    )
    return engine.__enter__()  # open for as long as the process lives


def _loaded(model: Path) -> tuple[Any, Any]:
    from diffusers import UNet2DConditionModel

    from runners.modules import WRAPPERS

    unet = UNet2DConditionModel.from_pretrained(model / "unet").eval()
    unet.requires_grad_(requires_grad=False)
    return unet, WRAPPERS["unet"](unet)


def _how(backend: str, dtype: str) -> Any:
    from optimizer.backends import How

    return How(backend, dtype, "denoiser", "unet", _signature())


def _quiet(_done: float, _total: float) -> None: ...


def _signature() -> Any:
    from optimizer.families.base import Ranges
    from optimizer.families.sd1 import SD1

    configs = {
        "unet": {**SD15_UNET, "in_channels": 4, "out_channels": 4},
        "text_encoder": {
            "max_position_embeddings": 77,
            "hidden_size": 768,
            "num_hidden_layers": 12,
        },
        "vae": {
            "block_out_channels": [128, 256, 512, 512],
            "latent_channels": 4,
            "in_channels": 3,
            "out_channels": 3,
        },
    }
    return SD1.signatures(configs, Ranges(256, 512, 1024, 1))["unet"]


def _export(wrapper: Any, calls: dict[str, Call], out: Path) -> None:
    import torch

    from optimizer.calls import resized, traced_sizes
    from optimizer.export import export_onnx

    signature = _signature()
    inputs = resized(next(iter(calls.values())).inputs, signature, traced_sizes(signature))
    export_onnx(wrapper, [torch.from_numpy(a) for a in inputs], signature, out / "model.onnx")


def _part(calls: dict[str, Call], *, held_out: bool) -> list[Call]:
    ordered = [calls[name] for name in sorted(calls)]
    return ordered[_CALIBRATION:] if held_out else ordered[:_CALIBRATION]


def _held_out(calls: dict[str, Call]) -> list[Call]:
    return _part(calls, held_out=True)
