"""A finished measurement with pictures on disk, without any model."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from benchmarks.comparison import Activity, Comparison, Conditions, Settings
from benchmarks.contestants import REFERENCE, Contestant
from benchmarks.learned import NO_MEASURES, Learned
from benchmarks.measure import Measured, Taken, Task
from benchmarks.metrics import StepSqnr
from benchmarks.tally import About, tally

NAMES = (REFERENCE, "int8", "int4")
SECONDS = (0.9, 0.3, 0.45)
NOISE = (0, 4, 16)


def contestants(folder: Path) -> tuple[Contestant, ...]:
    sizes = ((4000, 2000, 4000), (1200, 1000, 4000), (900, 800, 4000))
    return tuple(
        Contestant(name, "bundle", folder, "openvino", "bf16", *size, digest=f"sha256:{name}")
        for name, size in zip(NAMES, sizes, strict=True)
    )


def measured(folder: Path, prompts: tuple[str, ...], *, side: int = 16) -> Measured:
    """Grey pictures with noise that grows with the prompt's index, a second slower each level."""
    settings = Settings(
        prompts=prompts,
        prompts_source="a test",
        seeds=1,
        steps=3,
        guidance=5.0,
        threads=1,
        sqnr_prompts=1,
    )
    loaded = {name: {"load_seconds": 1.0} for name in NAMES}
    result = Measured(settings, loaded, dict.fromkeys(NAMES, 1.5), complete=True)
    rng = np.random.default_rng(0)
    for index, prompt in enumerate(prompts):
        taken = {}
        for entrant, seconds, noise in zip(contestants(folder), SECONDS, NOISE, strict=True):
            path = folder / "images" / entrant.slug / f"{index + 1:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            error = rng.normal(0, noise * (1 + index), (side, side, 3)) if noise else 0
            pixels = np.clip(np.full((side, side, 3), 128) + error, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path)
            taken[entrant.name] = Taken(path, seconds * (1 + index))
        result.rounds.append((Task(prompt, index), taken))
    for name, noise in zip(NAMES[1:], (1.0, 10.0), strict=True):
        sums = result.sqnr[name] = StepSqnr()
        for step in range(3):
            sums.add(step, signal=1000.0, noise=noise)
    result.peaks = dict.fromkeys(NAMES, 500_000_000)
    return result


def about(folder: Path, *, busy: float = 0.0) -> About:
    conditions = Conditions(
        date=datetime(2025, 11, 23, 12, 0, tzinfo=UTC),
        cpu="A processor",
        isa=("avx2",),
        cores=2,
        ram_bytes=8_000_000_000,
        os="Linux",
        before=Activity(cpu_share=busy, load_average=None),
        after=Activity(cpu_share=0.0, load_average=0.5),
        versions={"python": "3.11"},
    )
    return About("a model", "sha256:00", conditions, folder)


@pytest.fixture(scope="session")
def entrant() -> Callable[..., Contestant]:
    """A contestant of which only name, kind and path matter."""

    def make(name: str, kind: Literal["diffusers", "bundle"], path: Path) -> Contestant:
        return Contestant(name, kind, path, "diffusers", "fp32", 3, 2, 4)

    return make


@pytest.fixture
def entrants(tmp_path: Path) -> tuple[Contestant, ...]:
    """Those of `measurement`."""
    return contestants(tmp_path)


@pytest.fixture
def measurement(tmp_path: Path) -> Callable[..., Measured]:
    """Make a measurement of some prompts, its pictures under `tmp_path`/images."""

    def make(*prompts: str, side: int = 16) -> Measured:
        return measured(tmp_path, prompts, side=side)

    return make


@pytest.fixture
def compare_measured(tmp_path: Path) -> Callable[..., Comparison]:
    """Tally a measurement whose pictures lie under `tmp_path`."""

    def make(
        result: Measured,
        *,
        busy: float = 0.0,
        judge: object = None,
        learned: Learned = NO_MEASURES,
    ) -> Comparison:
        return tally(
            result,
            contestants(tmp_path),
            about=about(tmp_path, busy=busy),
            judge=judge,  # type: ignore[arg-type]
            learned=learned,
        )

    return make
