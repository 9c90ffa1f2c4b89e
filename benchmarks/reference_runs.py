"""`kiln bench`: starting up, and the reference model compiled and compared."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.watching import watched
from runners.console import Console

__all__ = [
    "compare_reference",
    "compile_reference",
    "lines_of_compile",
    "lines_of_reference",
    "lines_of_startup",
    "start",
]

_MODEL = Path(__file__).with_name("reference_model") / "model"
_HELP_RUNS = 9


def start(_console: Console, _out: Path) -> dict[str, Any]:
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


def compile_reference(console: Console, _out: Path) -> dict[str, Any]:
    """A cold compile of the reference model, then the same again and to another folder."""
    with tempfile.TemporaryDirectory() as private:
        environment = {**os.environ, "KILN_CACHE": str(Path(private) / "cache")}
        command = [sys.executable, "-m", "runners.cli", "compile", str(_MODEL), "--quant", "int8"]
        first, second = str(Path(private) / "first"), str(Path(private) / "second")
        with console.stage("Compile the reference model, cold"):
            cold, peak = watched([*command, "-o", first], environment)
        again, _ = watched([*command, "-o", first], environment)
        other, _ = watched([*command, "-o", second], environment)
    return {
        "cold_seconds": round(cold, 1),
        "peak_rss_bytes": peak,
        "again_seconds": round(again, 2),
        "to_another_folder_seconds": round(other, 2),
        "again_ratio": round(max(again, other) / cold, 4),
    }


def compare_reference(console: Console, out: Path) -> dict[str, Any]:
    """`kiln compare` of the reference model: all levels against diffusers, pictures and all."""
    report = out / "reference"
    command = [sys.executable, "-m", "runners.cli", "compare", str(_MODEL), "-o", str(report)]
    with console.stage("Compare the reference model's levels"):
        done = subprocess.run([*command, "--json"], check=True, stdout=subprocess.PIPE)
    document: dict[str, Any] = json.loads(done.stdout)
    return {"report": document["html"], "levels": document["levels"]}


def lines_of_startup(found: Mapping[str, Any]) -> list[str]:
    """What `kiln bench` prints."""
    return [
        f"kiln --help: {found['kiln_help_seconds']} s (limit {found['limit_seconds']}), "
        f"bare Python {found['python_seconds']} s"
    ]


def lines_of_compile(found: Mapping[str, Any]) -> list[str]:
    """What `kiln bench` prints."""
    return [
        f"compile of the reference model: {found['cold_seconds']} s cold, peak "
        f"{found['peak_rss_bytes'] / 2**30:.2f} GiB; again {found['again_seconds']} s, to "
        f"another folder {found['to_another_folder_seconds']} s"
    ]


def lines_of_reference(found: Mapping[str, Any]) -> list[str]:
    """What `kiln bench` prints."""
    rows = (
        f"  {row['name']:<16}{row['seconds_per_image']:>8.3f} s{row['speedup']:>7.2f}x"
        f"  denoiser {row['bytes_vs_fp32']:.3f}x of fp32, SQNR {row['sqnr_db']} dB"
        for row in found["levels"]
    )
    return ["reference model, per image:", *rows]
