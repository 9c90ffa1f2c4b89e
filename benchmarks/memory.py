"""Predicted against measured memory: `kiln plan`'s numbers and the peaks of fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.full_bundles import FULL_SIZE, full_bundle
from runners.console import Console

__all__ = ["Case", "lines", "measure_full_size", "measure_reference", "peak_of"]

_MODEL = Path(__file__).with_name("reference_model") / "model"
_WAYS: dict[str, tuple[str, ...]] = {"keep": (), "sequential": ("--residency", "sequential")}
"""Residency -> the options of `kiln generate` that ask for it."""

_LEVELS = ("none", "int8", "int4")
_SIZES = (64, 128, 256)
_BATCHES = (1, 2)
_STEPS = 2

Case = tuple[Path, str, int, int]
"""A bundle, a residency, a side in pixels, pictures at once."""

_FULL_SIDES = (256, 512)


def measure_reference(console: Console, out: Path) -> dict[str, Any]:
    """The reference model at three levels, three sizes and two batches, compiled where it isn't."""
    rows = []
    for level in _LEVELS:
        bundle = out / "memory" / level
        _compile(_MODEL, level, bundle, ("--steps", "4"), console)
        cases = [(bundle, *one) for one in product(_WAYS, _SIZES, _BATCHES)]
        with console.stage(f"Draw with {level}", len(cases)) as stage:
            for case in cases:
                rows.append({"level": level, **_row(case)})
                stage.advance()
    return {"rows": rows, **_worst(rows)}


def measure_full_size(console: Console, out: Path) -> dict[str, Any]:
    """Stable Diffusion 1.5 and XL with random weights in int8, compiled where they aren't: that is
    most of an hour.
    """
    rows = []
    for name in ("sd15", "sdxl"):
        model = FULL_SIZE[name]
        bundle = full_bundle(name, out, console)
        for way, side in product(_WAYS, _FULL_SIDES):
            with console.stage(f"Full-size {model.title}: draw at {side}, {way}"):
                rows.append({"model": name, **_row((bundle, way, side, 1))})
    return {"rows": rows, **_worst(rows)}


def _compile(
    model: Path, level: str, bundle: Path, options: tuple[str, ...], console: Console
) -> None:
    command = [sys.executable, "-m", "runners.cli", "compile", str(model), "--quant", level]
    with console.stage(f"Compile {bundle.name} ({level})"):
        subprocess.run(
            [*command, *options, "--force", "-o", str(bundle)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def _row(case: Case) -> dict[str, Any]:
    """One picture, or one batch, in a fresh process: what was predicted of it, and what it took."""
    from runners.bundle import read_manifest
    from runners.memory import rows
    from runners.outlook import outlook_of

    bundle, way, side, batch = case
    outlook = outlook_of(read_manifest(bundle), str(bundle))
    wanted = rows(outlook.parts, outlook.asked(side, side, batch), residency=way, tiled=False)  # type: ignore[arg-type]
    predicted, base = wanted[0].peak_bytes, outlook.parts.pipeline.base_bytes
    measured = peak_of(_drawing(case))
    return {
        "residency": way,
        "side": side,
        "batch": batch,
        "predicted_peak_bytes": predicted,
        "measured_peak_bytes": measured,
        "base_bytes": base,
        "total_error": round(predicted / measured - 1, 4),
        "above_base_error": round((predicted - base) / (measured - base) - 1, 4),
        "above_base_error_bytes": predicted - measured,
    }


def _drawing(case: Case) -> list[str]:
    bundle, way, side, batch = case
    count = ("--count", str(batch), "--batch", str(batch))
    drawn = ("--prompt", "a red circle", "--size", f"{side}x{side}", "--steps", str(_STEPS))
    out = Path(tempfile.gettempdir()) / f"kiln-memory-{os.getpid()}.png"
    command = [sys.executable, "-m", "runners.cli", "generate", str(bundle)]
    return [*command, *drawn, *count, *_WAYS[way], "-o", str(out)]


def peak_of(command: list[str]) -> int:
    """The most that a fresh process had resident, as the system counted it (Linux, macOS)."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return int(usage.ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def _worst(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    rows = list(rows)
    return {
        "most_over": max(row["total_error"] for row in rows),
        "most_under": min(row["total_error"] for row in rows),
        "worst_above_base": max((row["above_base_error"] for row in rows), key=abs),
        "worst_above_base_bytes": max((row["above_base_error_bytes"] for row in rows), key=abs),
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """The rows as a table."""
    said = ["predicted and measured peak of memory"]
    for row in found["rows"]:
        name = f"{row.get('model', '')} {row.get('level', '')}".strip()
        said.append(
            f"  {name:<6}{row['residency']:<12}{row['side']:>5} px, {row['batch']} at once:"
            f"{row['predicted_peak_bytes'] / 1e6:>8.0f}{row['measured_peak_bytes'] / 1e6:>8.0f} MB"
            f"{100 * row['total_error']:>+7.2f} %, above the base"
            f"{100 * row['above_base_error']:>+6.1f} %"
        )
    said.append(
        f"  most over {100 * found['most_over']:+.2f} %, most under "
        f"{100 * found['most_under']:+.2f} %, above the base "
        f"{100 * found['worst_above_base']:+.1f} %"
    )
    return said
