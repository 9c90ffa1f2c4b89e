"""`kiln bench`: Stable Diffusion 1.5 at full size, with random weights, each stage in a process."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.watching import watched
from runners.console import Console

__all__ = [
    "analyze",
    "build_for_cards",
    "compare",
    "lines_of_analyze",
    "lines_of_cards",
    "lines_of_compare",
    "lines_of_quantize",
    "quantize",
]


def compare(console: Console, _out: Path) -> dict[str, Any]:
    """Stable Diffusion 1.5's UNet with random weights against the peers."""
    import psutil

    from optimizer.worker import run_stage

    threads = psutil.cpu_count(logical=False) or 1
    with tempfile.TemporaryDirectory() as private:
        folders = {name: Path(private) / name for name in ("weights", "ours", "plain", "nncf")}
        weights, plain = folders["weights"], folders["plain"]
        stages: list[tuple[str, str, tuple[Any, ...]]] = [
            ("weights", "make_weights", ()),
            ("ours", "make_ours", (weights, "int8")),
            ("plain", "make_plain", (weights,)),
            ("nncf", "make_nncf", (weights, plain)),
        ]
        for name, function, arguments in stages:
            folders[name].mkdir()
            with console.stage(f"Full-size UNet: {function.replace('_', ' ')}") as stage:
                target = f"benchmarks.full_size:{function}"
                run_stage(target, (*arguments, folders[name]), progress=stage.progress)
        with console.stage("Full-size UNet: compare engines") as stage:
            run_stage(
                "benchmarks.full_size:compare_engines",
                (folders, threads, Path(private)),
                progress=stage.progress,
            )
        rows = json.loads((Path(private) / "rows.json").read_text("utf-8"))
    return {"threads": threads, "rows": rows}


_WAYS: dict[str, tuple[str, str, int]] = {
    "int4 hqq": ("int4", "hqq", 0),
    "int4 mse": ("int4", "mse", 2),
    "int4 gptq": ("int4", "gptq", 8),
    "int8 mse": ("int8", "mse", 32),
}
"""Row -> level, solver, calibration steps."""


def quantize(console: Console, _out: Path) -> dict[str, Any]:
    """What quantizing Stable Diffusion 1.5's UNet takes, each way in a process of its own."""
    from optimizer.worker import run_stage

    rows = {}
    with tempfile.TemporaryDirectory() as private:
        weights = Path(private) / "weights"
        weights.mkdir()
        with console.stage("Full-size UNet: make weights") as stage:
            run_stage("benchmarks.full_size:make_weights", (weights,), progress=stage.progress)
        for name, way in _WAYS.items():
            with console.stage(f"Full-size UNet: quantize, {name}") as stage:
                arguments = (weights, way, Path(private))
                run_stage("benchmarks.full_size:quantize", arguments, progress=stage.progress)
            rows[name] = json.loads((Path(private) / "quantized.json").read_text("utf-8"))
    return {"rows": rows}


def analyze(console: Console, _out: Path) -> dict[str, Any]:
    """`kiln analyze` of Stable Diffusion 1.5 at full size, random weights, with its defaults."""
    from optimizer.worker import run_stage

    with tempfile.TemporaryDirectory() as private:
        model = Path(private) / "model"
        model.mkdir()
        with console.stage("Full-size model: make weights") as stage:
            run_stage("benchmarks.full_models:make_sd15", (model,), progress=stage.progress)
        environment = {**os.environ, "KILN_CACHE": str(Path(private) / "cache")}
        found = Path(private) / "sensitivity.json"
        command = [sys.executable, "-m", "runners.cli", "analyze", str(model), "-o", str(found)]
        with console.stage("Full-size model: kiln analyze"):
            seconds, peak = watched(command, environment)
        layers = json.loads(found.read_text("utf-8"))["layers"]
    return {
        "seconds": round(seconds, 1),
        "limit_seconds": 1800,
        "peak_rss_bytes": peak,
        "layers": len(layers),
        "losses": sum(len(layer["losses"]) for layer in layers.values()),
    }


_CARDS = ("8.6", "8.9", "12.0")


def build_for_cards(console: Console, _out: Path) -> dict[str, Any]:
    """Stable Diffusion 1.5's UNet as TensorRT-RTX engines for three architectures at once."""
    from optimizer.worker import run_stage

    backend, rows = "tensorrt-rtx", {}
    with tempfile.TemporaryDirectory() as private:
        weights = Path(private) / "weights"
        weights.mkdir()
        with console.stage("Full-size UNet: make weights") as stage:
            run_stage("benchmarks.full_size:make_weights", (weights,), progress=stage.progress)
        for quant in ("none", "int8", "int4"):
            graph, out = Path(private) / f"{quant}-graph", Path(private) / quant
            graph.mkdir()
            out.mkdir()
            with console.stage(f"Full-size UNet: export, {quant}") as stage:
                target = "benchmarks.full_size:make_graph"
                run_stage(target, (weights, quant, backend, graph), progress=stage.progress)
            with console.stage(f"Full-size UNet: build, {quant}") as stage:
                target = "benchmarks.full_size:build_graph"
                run_stage(target, (graph, backend, _CARDS, out), progress=stage.progress)
            rows[quant] = json.loads((out / "built.json").read_text("utf-8"))
            shutil.rmtree(graph)
    return {"capabilities": _CARDS, "rows": rows}


def lines_of_compare(found: Mapping[str, Any]) -> list[str]:
    """What `kiln bench` prints."""
    rows = (
        f"  {name:<26}{row['seconds']:>8.3f} s{row['speedup']:>7.2f}x  {row['sqnr_db']} dB"
        for name, row in found["rows"].items()
    )
    return [f"Stable Diffusion 1.5's UNet, random weights, {found['threads']} threads:", *rows]


def lines_of_quantize(found: Mapping[str, Any]) -> list[str]:
    """What `kiln bench` prints."""
    rows = (
        f"  {name:<12}{row['seconds']:>8.1f} s, peak {row['peak_vs_fp32']}x of fp32, "
        f"{row['bytes_vs_fp32']:.3f}x of fp32 bytes, {row['sqnr_db']} dB"
        for name, row in found["rows"].items()
    )
    return ["quantizing Stable Diffusion 1.5's UNet:", *rows]


def lines_of_analyze(found: Mapping[str, Any]) -> list[str]:
    """What `kiln bench` prints."""
    return [
        f"kiln analyze of Stable Diffusion 1.5: {found['seconds']} s for {found['losses']} "
        f"losses of {found['layers']} layers, peak {found['peak_rss_bytes'] / 2**30:.2f} GiB"
    ]


def lines_of_cards(found: Mapping[str, Any]) -> list[str]:
    """What `kiln bench` prints."""
    rows = (
        f"  {name:<6}{row['seconds']:>7.1f} s, peak {row['peak_rss_bytes'] / 2**30:.2f} "
        f"GiB, {row['bytes'] / 1e6:.0f} MB ({row['bytes_vs_predicted']:.3f}x of predicted)"
        f", {row['layers_low_bit']} of {row['layers']} quantized layers on low-bit kernels"
        for name, row in found["rows"].items()
    )
    return ["Stable Diffusion 1.5's UNet for TensorRT-RTX:", *rows]
