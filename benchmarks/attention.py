"""Memory against resolution of Stable Diffusion 1.5's largest self-attention, by how it is run.

One block as the UNet's first level has it: 8 heads of 40 numbers, a token for each latent. ONNX
Runtime runs it with the standard operator, which fills the attention matrix, and in the blocks that
kiln's builder puts in its place; OpenVINO fuses it by itself. Each size runs in a process of its
own, for one prompt; a guided step takes twice as much.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.worker import run_stage
from runners import gauge
from runners.console import Console

__all__ = ["largest_side", "lines", "measure", "rise"]

SIDES = (256, 384, 512)
"""In pixels; 8 of them are a latent."""
_HEADS, _SIZE, _LATENT = 8, 40, 8
_CARD_BYTES = 8 * 10**9
_PROMPTS = 2
_LEGAL = 64
"""Sides are multiples of it in Stable Diffusion 1.5."""


def measure(console: Console, _out: Path) -> dict[str, Any]:
    """Rows of peaks by side for each way, and the largest side that 8 GB hold, by extrapolation."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as private:
        for way in _WAYS:
            with console.stage(f"Attention, {way}") as stage:
                peaks = {}
                for side in SIDES:
                    out = Path(private) / f"{way}-{side}.json"
                    arguments = (way, side, out)
                    run_stage("benchmarks.attention:rise", arguments, progress=stage.progress)
                    peaks[side] = json.loads(out.read_text("utf-8"))["bytes"]
            rows[way] = {"peak_bytes": peaks, "largest_side": largest_side(peaks)}
    return {"memory_bytes": _CARD_BYTES, "prompts": _PROMPTS, "rows": rows}


def largest_side(peaks: Mapping[int, int]) -> int:
    """The largest legal side whose guided step stays below 8 GB: through the measured peaks goes a
    parabola in the number of tokens, with no negative term.
    """
    tokens = np.array([_tokens(side) for side in peaks], dtype=np.float64)
    wanted = np.array(list(peaks.values()), dtype=np.float64)
    table = np.stack([np.ones_like(tokens), tokens, tokens**2], axis=1)
    scale = table.max(axis=0)
    found = np.linalg.lstsq(table / scale, wanted, rcond=None)[0] / scale
    if found[2] < 0:
        found = np.append(np.linalg.lstsq(table[:, :2], wanted, rcond=None)[0], 0.0)
    side = _LEGAL
    while _PROMPTS * _value(found, side + _LEGAL) < _CARD_BYTES and side < 1 << 14:
        side += _LEGAL
    return side


def _value(found: Sequence[float] | np.ndarray[Any, Any], side: int) -> float:
    count = float(_tokens(side))
    return float(found[0] + found[1] * count + found[2] * count**2)


def _tokens(side: int) -> int:
    return (side // _LATENT) ** 2


def rise(way: str, side: int, out: Path) -> None:
    """Write what one run of the block takes at most above what was there before."""
    run = _WAYS[way]()
    numbers = np.random.default_rng(0)

    def draw(count: int) -> Any:
        return numbers.standard_normal((1, count, _HEADS * _SIZE)).astype(np.float32)

    run(draw(64))
    given = draw(_tokens(side))
    gauge.trim()
    before = gauge.resident_bytes()
    gauge.reset_peak()
    run(given)
    out.write_text(json.dumps({"bytes": max(0, gauge.peak_bytes() - before)}), "utf-8")


def _model() -> Any:
    """[batch, tokens, 320] -> the same, through q, k and v, attention, and the way out."""
    import onnx_ir as ir
    from onnx import TensorProto, helper, numpy_helper

    width, numbers = _HEADS * _SIZE, np.random.default_rng(1)
    axes = ["batch", "tokens", width]
    nodes, weights = [], [numpy_helper.from_array(np.array([0, 0, _HEADS, _SIZE]), "split")]
    for name in "qkv":
        matrix = (numbers.standard_normal((width, width)) / width**0.5).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"{name}.weight"))
        nodes += [
            helper.make_node("MatMul", ["x", f"{name}.weight"], [f"{name}.flat"]),
            helper.make_node("Reshape", [f"{name}.flat", "split"], [f"{name}.split"]),
            helper.make_node("Transpose", [f"{name}.split"], [name], perm=[0, 2, 1, 3]),
        ]
    weights.append(numpy_helper.from_array(np.array([0, 0, width]), "joined"))
    nodes += [
        helper.make_node("Attention", ["q", "k", "v"], ["heads"]),
        helper.make_node("Transpose", ["heads"], ["turned"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["turned", "joined"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name in "xy")
    known = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", _HEADS, "tokens", _SIZE])
        for name in "qkv"
    ]
    graph = helper.make_graph(nodes, "block", [x], [y], weights, value_info=known)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return ir.from_proto(made)


_Run = Callable[[Any], object]


def _onnxruntime(*, blocks: bool) -> _Run:
    import onnx_ir as ir
    import onnxruntime as ort

    from optimizer.backends.onnxruntime_attention import use_blocks

    model, options = _model(), ort.SessionOptions()
    if blocks:
        use_blocks(model)
    options.log_severity_level = 3
    raw = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})


def _openvino() -> _Run:
    import onnx_ir as ir
    import openvino as ov

    core = ov.Core()
    model = core.read_model(ir.to_proto(_model()).SerializeToString())

    def run(x: Any) -> object:
        fixed = model.clone()
        fixed.reshape(list(x.shape))
        return core.compile_model(fixed, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x])

    return run


_WAYS: dict[str, Callable[[], _Run]] = {
    "onnxruntime, matrix": lambda: _onnxruntime(blocks=False),
    "onnxruntime, blocks": lambda: _onnxruntime(blocks=True),
    "openvino, fused": _openvino,
}


def lines(found: Mapping[str, Any]) -> list[str]:
    """A row for each way, for people."""
    text = ["self-attention of Stable Diffusion 1.5 (one prompt), MB at a side of:"]
    for way, row in found["rows"].items():
        peaks = ", ".join(f"{side} px {size / 1e6:.0f}" for side, size in row["peak_bytes"].items())
        text.append(f"  {way:<22}{peaks}; 8 GB hold {row['largest_side']} px with guidance")
    return text
