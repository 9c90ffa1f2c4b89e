"""A whole Stable Diffusion XL of random weights through `kiln compile`: time, memory, bytes."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.full_bundles import FULL_SIZE, OPTIONS
from benchmarks.watching import watched
from runners.console import Console

__all__ = ["lines", "measure"]

_LEVELS: dict[str, tuple[str, ...]] = {"int8": (), "int4": ("--solver", "hqq")}
"""Level -> its other options: HQQ needs no recorded runs, GPTQ's covariances several passes."""

_MODEL = FULL_SIZE["sdxl"]
_OPTIONS = (*OPTIONS, *_MODEL.options)


def measure(console: Console, _out: Path) -> dict[str, Any]:
    """Compile it to int8, then to int4, which shares the recorded runs and all but the UNet."""
    from optimizer.worker import run_stage

    rows = {}
    with tempfile.TemporaryDirectory() as private:
        folder = Path(private)
        (folder / "model").mkdir()
        environment = {**os.environ, "KILN_CACHE": str(folder / "cache")}
        with console.stage("Full-size SDXL: make weights") as stage:
            run_stage(_MODEL.make, (folder / "model",), progress=stage.progress)
        for quant, more in _LEVELS.items():
            out = folder / quant
            command = [sys.executable, "-m", "runners.cli", "compile", str(folder / "model")]
            options = ["--quant", quant, *more, *_OPTIONS, "-o", str(out)]
            with console.stage(f"Full-size SDXL: compile, {quant}"):
                seconds, peak = watched([*command, *options], environment)
            rows[quant] = {
                "seconds": round(seconds, 1),
                "peak_rss_bytes": peak,
                **_facts(out),
                "stages": _stage_seconds(folder / "cache"),
            }
    return {"options": _OPTIONS, "rows": rows}


def _facts(bundle: Path) -> dict[str, Any]:
    """What the bundle's manifest says of its size, quality and speed."""
    from runners.bundle import read_manifest

    manifest = read_manifest(bundle)
    denoiser = manifest.component("denoiser")
    assert manifest.speed is not None
    return {
        "bundle_bytes": sum(entry.size for entry in manifest.files.values()),
        "denoiser_bytes": denoiser.engine_bytes,
        "denoiser_fp32_bytes": denoiser.fp32_bytes,
        "layers": denoiser.layers_quantized,
        "layers_low_bit": denoiser.layers_low_bit,
        "sqnr_db": denoiser.sqnr_db,
        "oracle_sqnr_db": denoiser.oracle_sqnr_db,
        "step": json.loads(manifest.speed.model_dump_json()),
    }


def _stage_seconds(cache: Path) -> dict[str, list[float]]:
    """Kind of stage -> what each of them took that is in the store by now."""
    found: dict[str, list[float]] = {}
    for path in sorted(cache.glob("v*/*/*/seconds.txt")):
        found.setdefault(path.parent.parent.name, []).append(float(path.read_text("utf-8")))
    return found


def lines(found: Mapping[str, Any]) -> list[str]:
    """What `kiln bench` prints."""
    rows = (
        f"  {name:<6}{row['seconds']:>7.0f} s, peak {row['peak_rss_bytes'] / 2**30:.1f} GiB"
        f", denoiser {row['denoiser_bytes'] / 1e6:.0f} MB, {row['layers_low_bit']} of "
        f"{row['layers']} layers on low-bit kernels, {row['sqnr_db']:.1f} dB"
        for name, row in found["rows"].items()
    )
    return ["compiling a full-size SDXL:", *rows]
