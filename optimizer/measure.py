"""The speed of one denoising step: the engine against eager fp32, interleaved in one process."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from optimizer.calls import load_calls
from optimizer.job import Job
from optimizer.load import load_module
from optimizer.plan import Plan
from optimizer.prepare import run_module
from runners.engines import engine_class
from runners.modules import WRAPPERS

__all__ = ["load_average", "measure_step"]

_SECONDS = 12.0
_ROUNDS = (5, 60)
"""At least and at most so many rounds, and about so many seconds in between."""


def measure_step(plan: Plan, job: Job, recorded: Path, engine_folder: Path, out: Path) -> None:
    """Write speed.json: medians of both, on a recorded call at the native size with guidance."""
    threads = psutil.cpu_count(logical=False) or 1
    torch.set_num_threads(threads)
    call = next(iter(load_calls(recorded / f"{job.spec.name}.safetensors").values()))
    wrapper = WRAPPERS[job.spec.wrapper](load_module(plan.source, job.spec.folder))
    built = json.loads((engine_folder / "built.json").read_text("utf-8"))
    engine = engine_class(job.backend)(
        {
            role: bytearray((engine_folder / name).read_bytes())
            for role, name in built["files"].items()
        },
        signature=job.signature,
        properties=built["properties"],
        threads=threads,
    )
    feeds = call.feeds(job.signature)
    load = load_average()
    with engine:
        eager_s, engine_s = _interleaved(lambda: run_module(wrapper, call), lambda: engine(feeds))
    document = {
        "eager_fp32_ms": round(1000 * eager_s, 3),
        "engine_ms": round(1000 * engine_s, 3),
        "speedup": round(eager_s / engine_s, 3),
        "threads": threads,
        "load_average": load,
    }
    (out / "speed.json").write_text(json.dumps(document), "utf-8")


def _interleaved(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of both, called in turn, two calls of each not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    begin = time.monotonic()
    while len(times[0]) < _ROUNDS[0] + 2 or (
        len(times[0]) < _ROUNDS[1] and time.monotonic() - begin < _SECONDS
    ):
        for function, found in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return statistics.median(times[0][2:]), statistics.median(times[1][2:])


def load_average() -> float | None:
    """The machine's load over the last minute, in runnable processes; None where unknown."""
    try:
        return round(float(psutil.getloadavg()[0]), 2)
    except (AttributeError, OSError):
        return None
