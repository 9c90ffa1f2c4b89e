"""The speed of one denoising step: the engine against eager fp32, interleaved in one process."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

__all__ = ["Others", "load_average", "measure_step", "others_time"]

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
    with engine, others_time() as others:
        eager_s, engine_s = _interleaved(lambda: run_module(wrapper, call), lambda: engine(feeds))
    document = {
        "eager_fp32_ms": round(1000 * eager_s, 3),
        "engine_ms": round(1000 * engine_s, 3),
        "speedup": round(eager_s / engine_s, 3),
        "threads": threads,
        "load_average": load,
        "others_share": round(others.share, 3),
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


@dataclass
class Others:
    """What other programs took of the machine meanwhile."""

    share: float = 0.0
    """Of the time of all its cores; known at the end."""


@contextmanager
def others_time() -> Iterator[Others]:
    """Watch how busy the machine is with other processes than this one."""
    found, (busy, total), own = Others(), _machine_time(), time.process_time()
    yield found
    now_busy, now_total = _machine_time()
    spent = now_busy - busy - (time.process_time() - own)
    found.share = min(1.0, max(0.0, spent / max(now_total - total, 1e-6)))


def _machine_time() -> tuple[float, float]:
    """Seconds that all cores together have worked, and existed; guests' are in user's."""
    times = psutil.cpu_times()._asdict()
    total = sum(n for name, n in times.items() if not name.startswith("guest"))
    return total - times["idle"] - times.get("iowait", 0.0), total


def load_average() -> float | None:
    """The machine's load over the last minute, in runnable processes; None where unknown."""
    try:
        return round(float(psutil.getloadavg()[0]), 2)
    except (AttributeError, OSError):
        return None
