"""`kiln bench`: speed, size and start-up, each against its alternative measured in the same run."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from runners.console import Console, quiet_libraries

__all__ = ["bench"]

_MODEL = Path(__file__).with_name("reference_model") / "model"
_HELP_RUNS = 9


@click.command()
@click.option(
    "--section",
    type=click.Choice(
        [
            *("startup", "compile", "reference", "full-size"),
            *("quantize", "analyze", "tensorrt", "install", "sdxl", "aoti"),
            *("memory", "memory-full", "tiles"),
            "attention",
            *("lora", "lora-full-size"),
        ]
    ),
    multiple=True,
    help="Only this section; may be given several times.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("out/bench"),
    show_default=True,
    help="Folder for bench.json and the comparison's report.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
def bench(section: tuple[str, ...], out: Path, as_json: bool) -> None:  # noqa: FBT001
    """Measure kiln against its alternatives on this machine; takes the better part of an hour."""
    quiet_libraries()
    console = Console(json_output=as_json)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "bench.json"
    document = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for name, measure in _SECTIONS.items():
        if section and name not in section:
            continue
        document[name] = {"conditions": _conditions(), **measure(out, console)}
        path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    console.result(_text(document), document)


def _conditions() -> dict[str, Any]:
    """The machine, its load and the versions, as they are when a section begins."""
    from benchmarks.conditions import load_average, tool_versions
    from profiles import hardware

    facts = hardware.detect()
    return {
        "cpu": facts.cpu.name,
        "isa": list(facts.cpu.isa),
        "cores": facts.cpu.cores,
        "load_average": load_average(),
        "versions": tool_versions(),
    }


def _startup(_out: Path, _console: Console) -> dict[str, Any]:
    """`kiln --help` against a bare interpreter, in turn."""
    help_s, bare_s = [], []
    for _ in range(_HELP_RUNS):
        help_s.append(_seconds([sys.executable, "-m", "runners.cli", "--help"]))
        bare_s.append(_seconds([sys.executable, "-c", ""]))
    return {
        "kiln_help_seconds": round(statistics.median(help_s), 3),
        "python_seconds": round(statistics.median(bare_s), 3),
        "limit_seconds": 0.5,
    }


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _compile(_out: Path, console: Console) -> dict[str, Any]:
    """A cold compile of the reference model, then the same again and to another folder."""
    with tempfile.TemporaryDirectory() as private:
        environment = {**os.environ, "KILN_CACHE": str(Path(private) / "cache")}
        command = [sys.executable, "-m", "runners.cli", "compile", str(_MODEL), "--quant", "int8"]
        first, second = str(Path(private) / "first"), str(Path(private) / "second")
        with console.stage("Compile the reference model, cold"):
            cold, peak = _watched([*command, "-o", first], environment)
        again, _ = _watched([*command, "-o", first], environment)
        other, _ = _watched([*command, "-o", second], environment)
    return {
        "cold_seconds": round(cold, 1),
        "peak_rss_bytes": peak,
        "again_seconds": round(again, 2),
        "to_another_folder_seconds": round(other, 2),
        "again_ratio": round(max(again, other) / cold, 4),
    }


def _watched(command: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Seconds, and the largest resident size of the process and its children together."""
    import psutil

    start, peak = time.monotonic(), 0
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    process = psutil.Process(child.pid)
    while child.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in family))
        except psutil.Error:
            pass
        time.sleep(0.02)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return time.monotonic() - start, peak


def _reference(out: Path, console: Console) -> dict[str, Any]:
    """`kiln compare` of the reference model: all levels against diffusers, pictures and all."""
    report = out / "reference"
    command = [sys.executable, "-m", "runners.cli", "compare", str(_MODEL), "-o", str(report)]
    with console.stage("Compare the reference model's levels"):
        done = subprocess.run([*command, "--json"], check=True, stdout=subprocess.PIPE)
    document: dict[str, Any] = json.loads(done.stdout)
    return {"report": document["html"], "levels": document["levels"]}


def _full_size(_out: Path, console: Console) -> dict[str, Any]:
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


def _quantize(_out: Path, console: Console) -> dict[str, Any]:
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


def _analyze(_out: Path, console: Console) -> dict[str, Any]:
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
            seconds, peak = _watched(command, environment)
        layers = json.loads(found.read_text("utf-8"))["layers"]
    return {
        "seconds": round(seconds, 1),
        "limit_seconds": 1800,
        "peak_rss_bytes": peak,
        "layers": len(layers),
        "losses": sum(len(layer["losses"]) for layer in layers.values()),
    }


_CARDS = ("8.6", "8.9", "12.0")


def _tensorrt(_out: Path, console: Console) -> dict[str, Any]:
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


def _install(_out: Path, console: Console) -> dict[str, Any]:
    """Packing and installing against a plain copy with hashing, on the disk of temporary files."""
    from benchmarks.shipping import measure

    return measure(console, _watched, size=10**9, pack_size=2 * 10**9, rounds=9)


def _sdxl(_out: Path, console: Console) -> dict[str, Any]:
    """A full-size SDXL, random weights, compiled to int8 and int4."""
    from benchmarks.full_compile import measure

    return measure(console, _watched)


def _memory(out: Path, console: Console) -> dict[str, Any]:
    """What `kiln plan` predicts of the reference model against fresh processes' peaks."""
    from benchmarks.memory import measure_reference

    return measure_reference(_MODEL, out, console)


def _memory_full(_out: Path, console: Console) -> dict[str, Any]:
    """The same of full-size models with random weights."""
    from benchmarks.memory import measure_full_size

    return measure_full_size(console)


def _attention(_out: Path, console: Console) -> dict[str, Any]:
    """Memory against resolution of the largest self-attention, with its matrix and without."""
    from benchmarks.attention import measure

    return measure(console)


def _aoti(_out: Path, console: Console) -> dict[str, Any]:
    """Repeated blocks compiled once against compiling whole: a FLUX and a UNet, small widths."""
    from benchmarks.regional import measure

    return measure(console)


def _tiles(out: Path, console: Console) -> dict[str, Any]:
    """Decoding in seamless tiles and without."""
    from benchmarks.tiles import measure_tiles

    return measure_tiles(out, console)


def _lora(_out: Path, console: Console) -> dict[str, Any]:
    """LoRAs on the reference model's engines."""
    from benchmarks.lora import measure

    return measure(console, _watched)


def _lora_full_size(_out: Path, console: Console) -> dict[str, Any]:
    """LoRAs on a full-size Stable Diffusion 1.5, random weights."""
    from benchmarks.lora import measure_full_size

    return measure_full_size(console, _watched)


_SECTIONS: dict[str, Callable[[Path, Console], dict[str, Any]]] = {
    "startup": _startup,
    "compile": _compile,
    "reference": _reference,
    "full-size": _full_size,
    "quantize": _quantize,
    "analyze": _analyze,
    "tensorrt": _tensorrt,
    "install": _install,
    "sdxl": _sdxl,
    "memory": _memory,
    "memory-full": _memory_full,
    "tiles": _tiles,
    "attention": _attention,
    "lora": _lora,
    "lora-full-size": _lora_full_size,
    "aoti": _aoti,
}


def _text(document: dict[str, Any]) -> str:
    lines = []
    if found := document.get("startup"):
        lines.append(
            f"kiln --help: {found['kiln_help_seconds']} s (limit {found['limit_seconds']}), "
            f"bare Python {found['python_seconds']} s"
        )
    if found := document.get("attention"):
        from benchmarks import attention

        lines += attention.lines(found)
    if found := document.get("compile"):
        lines.append(
            f"compile of the reference model: {found['cold_seconds']} s cold, peak "
            f"{found['peak_rss_bytes'] / 2**30:.2f} GiB; again {found['again_seconds']} s, to "
            f"another folder {found['to_another_folder_seconds']} s"
        )
    if found := document.get("reference"):
        lines.append("reference model, per image:")
        for row in found["levels"]:
            lines.append(
                f"  {row['name']:<16}{row['seconds_per_image']:>8.3f} s{row['speedup']:>7.2f}x"
                f"  denoiser {row['bytes_vs_fp32']:.3f}x of fp32, SQNR {row['sqnr_db']} dB"
            )
    if found := document.get("full-size"):
        lines.append(f"Stable Diffusion 1.5's UNet, random weights, {found['threads']} threads:")
        for name, row in found["rows"].items():
            lines.append(
                f"  {name:<26}{row['seconds']:>8.3f} s{row['speedup']:>7.2f}x  {row['sqnr_db']} dB"
            )
    if found := document.get("quantize"):
        lines.append("quantizing Stable Diffusion 1.5's UNet:")
        for name, row in found["rows"].items():
            lines.append(
                f"  {name:<12}{row['seconds']:>8.1f} s, peak {row['peak_vs_fp32']}x of fp32, "
                f"{row['bytes_vs_fp32']:.3f}x of fp32 bytes, {row['sqnr_db']} dB"
            )
    if found := document.get("analyze"):
        lines.append(
            f"kiln analyze of Stable Diffusion 1.5: {found['seconds']} s for {found['losses']} "
            f"losses of {found['layers']} layers, peak {found['peak_rss_bytes'] / 2**30:.2f} GiB"
        )
    if found := document.get("tensorrt"):
        lines.append("Stable Diffusion 1.5's UNet for TensorRT-RTX:")
        for name, row in found["rows"].items():
            lines.append(
                f"  {name:<6}{row['seconds']:>7.1f} s, peak {row['peak_rss_bytes'] / 2**30:.2f} "
                f"GiB, {row['bytes'] / 1e6:.0f} MB ({row['bytes_vs_predicted']:.3f}x of predicted)"
                f", {row['layers_low_bit']} of {row['layers']} quantized layers on low-bit kernels"
            )
    if found := document.get("install"):
        lines.append(
            f"install: {found['throughput_of_copy']}x of a plain copy and sha256 "
            f"({found['throughput_of_flushed_copy']}x of one that is flushed to the disk); pack of "
            f"{found['pack_bytes'] / 1e9:.1f} GB: {found['pack_peak_rss_bytes'] / 1e6:.0f} MB"
        )
    if found := document.get("sdxl"):
        lines.append("compiling a full-size SDXL:")
        for name, row in found["rows"].items():
            lines.append(
                f"  {name:<6}{row['seconds']:>7.0f} s, peak {row['peak_rss_bytes'] / 2**30:.1f} GiB"
                f", denoiser {row['denoiser_bytes'] / 1e6:.0f} MB, {row['layers_low_bit']} of "
                f"{row['layers']} layers on low-bit kernels, {row['sqnr_db']:.1f} dB"
            )
    for name, title in (("memory", "reference model"), ("memory-full", "full-size models")):
        if found := document.get(name):
            from benchmarks.memory import text as memory_text

            lines += memory_text(found, title)
    if found := document.get("tiles"):
        from benchmarks.tiles import text as tiles_text

        lines += tiles_text(found)
    for name in ("lora", "lora-full-size"):
        if found := document.get(name):
            lines.append(
                f"{name}: swap {1000 * found['swap_seconds']:.0f} ms, first load "
                f"{found['first_load_seconds']:.2f} s, a step with rank {found['ranks'][0]} at "
                f"{found['speed_with_lora']:.2f}x of the speed without"
            )
    if found := document.get("aoti"):
        from benchmarks.regional import text as aoti_text

        lines += aoti_text(found)
    return "\n".join(lines)
