"""Where the marks of the report's two plots go, in SVG units; the template draws them.

Decibels above `AXIS_TOP_DB` stand on the plot's upper edge, because a level that is equal to the
reference (200 dB) would press all others to the floor; their labels have the true value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.comparison import Comparison, Row

__all__ = ["AXIS_TOP_DB", "Line", "Mark", "Plot", "cosine_plot", "speed_plot", "step_plot"]

AXIS_TOP_DB = 60.0
"""About where fp32 rounding alone begins to be measured; no picture shows a difference there."""

WIDTH, HEIGHT = 520.0, 340.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 20.0, 22.0, 48.0
_RADIUS = (5.0, 22.0)
_LABEL_WIDTH, _LABEL_HEIGHT = 130.0, 36.0


@dataclass(frozen=True)
class Mark:
    """A labelled disc: x and y in SVG units, area by the denoiser's size."""

    x: float
    y: float
    radius: float
    level: int
    """Index of the level's colour."""
    name: str
    label: str
    anchor: str
    """SVG text-anchor that keeps the label inside the plot."""
    label_x: float
    label_y: float


@dataclass(frozen=True)
class Line:
    """One level's polyline and the label at its end."""

    points: tuple[tuple[float, float], ...]
    level: int
    name: str

    @property
    def path(self) -> str:
        """The points as SVG's `points` attribute."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


@dataclass(frozen=True)
class Plot:
    """A frame with its ticks (position, text), and what is drawn in it."""

    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_title: str
    y_title: str
    marks: tuple[Mark, ...] = ()
    lines: tuple[Line, ...] = ()
    x_one: float | None = None
    """Where the plain pipeline's speed stands."""
    width: float = WIDTH
    height: float = HEIGHT


@dataclass(frozen=True)
class _Axis:
    """A linear scale from [low, high] to [start, end] in SVG units."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int, *, least: float = 0.0) -> tuple[tuple[float, str], ...]:
        """About `count` round values, no closer to each other than `least`."""
        step = max(least, _nice_step((self.high - self.low) / count))
        first, last = math.ceil(self.low / step), math.floor(self.high / step + 1e-9)
        return tuple((self(i * step), f"{i * step:g}") for i in range(first, last + 1))


def speed_plot(comparison: Comparison) -> Plot | None:
    """Quality (teacher-forced SQNR) against speed-up; None before any SQNR was measured."""
    rows = _levels(comparison)
    shown = [(i, row, row.sqnr_db) for i, row in enumerate(rows) if row.sqnr_db is not None]
    if not shown:
        return None
    fastest = max(1.0, *(row.speedup for _, row, _ in shown))
    x = _Axis(0, fastest * 1.18, _LEFT, WIDTH - _RIGHT)
    y = _decibels([value for _, _, value in shown])
    largest = max((row.denoiser_bytes for _, row, _ in shown), default=0)
    return Plot(
        left=_LEFT,
        right=WIDTH - _RIGHT,
        top=_TOP,
        bottom=HEIGHT - _BOTTOM,
        x_ticks=x.ticks(6),
        y_ticks=y.ticks(5),
        x_title="times as fast as diffusers fp32",
        y_title="SQNR, dB",
        marks=_spread(_mark(i, row, (x(row.speedup), y(db)), largest) for i, row, db in shown),
        x_one=x(1.0),
    )


def step_plot(comparison: Comparison) -> Plot | None:
    """SQNR at each denoising step, the first one being the noisiest; None without any."""
    values = [row.sqnr_db_per_step for row in _levels(comparison)]
    if not any(values):
        return None
    return _by_step(comparison, values, _decibels([db for line in values for db in line]))


def cosine_plot(comparison: Comparison) -> Plot | None:
    """How far freely running latents have come apart, 1 - cosine as a power of ten, by step."""
    values = [
        tuple(_apart(value) for value in row.latent_cosine_per_step) for row in _levels(comparison)
    ]
    if not any(values):
        return None
    known = [value for line in values for value in line]
    low = math.floor(min(known))
    y = _Axis(low, max(math.ceil(max(known)), low + 1), HEIGHT - _BOTTOM, _TOP)
    return replace(_by_step(comparison, values, y), y_ticks=y.ticks(5, least=1.0), y_title="log10")


def _by_step(comparison: Comparison, values: Sequence[Sequence[float]], y: _Axis) -> Plot:
    """A line a level, over the denoising steps."""
    steps = max(len(line) for line in values)
    x = _Axis(1, max(2, steps), _LEFT + 8, WIDTH - _RIGHT - 8)
    return Plot(
        left=_LEFT,
        right=WIDTH - _RIGHT,
        top=_TOP,
        bottom=HEIGHT - _BOTTOM,
        x_ticks=x.ticks(8, least=1.0),
        y_ticks=y.ticks(5),
        x_title="denoising step",
        y_title="SQNR, dB",
        lines=tuple(
            Line(tuple((x(k + 1), y(value)) for k, value in enumerate(line)), i, row.name)
            for i, (row, line) in enumerate(zip(_levels(comparison), values, strict=True))
        ),
    )


def _apart(cosine: float) -> float:
    """log10 of 1 - cosine, down to where fp32 can't tell directions apart."""
    return math.log10(max(1 - cosine, 1e-8))


def _levels(comparison: Comparison) -> list[Row]:
    return [row for row in comparison.levels if not row.reference]


def _mark(index: int, row: Row, at: tuple[float, float], largest: int) -> Mark:
    small, large = _RADIUS
    share = math.sqrt(row.denoiser_bytes / largest) if largest else 0.0
    radius = max(small, large * share)
    x, y = at
    outside = x + radius + 90 > WIDTH
    return Mark(
        x=x,
        y=y,
        radius=radius,
        level=index,
        name=row.name,
        label=f"{row.sqnr_db:.1f} dB, {row.speedup:.2f}x",
        anchor="end" if outside else "start",
        label_x=x - radius - 6 if outside else x + radius + 6,
        label_y=max(y, _TOP + 12),
    )


def _spread(marks: Iterable[Mark]) -> tuple[Mark, ...]:
    """From the top down, move a label below those that it would cover."""
    placed: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: mark.label_y):
        taken = [
            other.label_y + _LABEL_HEIGHT
            for other in placed
            if abs(other.label_x - mark.label_x) < _LABEL_WIDTH
        ]
        placed.append(replace(mark, label_y=max([mark.label_y, *taken])))
    return tuple(placed)


def _decibels(values: Sequence[float]) -> _Axis:
    """From a round value below the lowest to one above the highest, `AXIS_TOP_DB` at most."""
    lowest = min(*values, AXIS_TOP_DB - 10) if values else 0.0
    highest = min(max(values, default=0.0), AXIS_TOP_DB)
    low = 5 * math.floor((lowest - 2) / 5)
    high = min(AXIS_TOP_DB, 5 * math.ceil((highest + 2) / 5))
    return _Axis(low, max(high, low + 10), HEIGHT - _BOTTOM, _TOP)


def _nice_step(rough: float) -> float:
    """The least of 1, 2, 5 x 10^n that isn't below `rough`."""
    power = math.pow(10, math.floor(math.log10(rough)))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
