"""Writes a comparison down: report.json, report.html (one offline file), a table for the terminal.

The page has no script and no address in it: pictures are data URIs, plots are inline SVG, and all
text that came from outside is escaped by the template.
"""

from __future__ import annotations

import io
from pathlib import Path

from benchmarks import metrics, plots
from benchmarks.comparison import Comparison, Row
from benchmarks.gallery import gallery
from optimizer.numerics import EXACT_DB
from runners.console import finite_json

__all__ = ["render", "table", "write"]

_DASH = "\N{EN DASH}"


def write(comparison: Comparison, folder: Path) -> tuple[Path, Path]:
    """Write report.json and report.html into `folder`, where its pictures are; returns both."""
    document, page = folder / "report.json", folder / "report.html"
    _replace(document, finite_json(comparison.model_dump(mode="json")) + "\n")
    _replace(page, render(comparison, folder))
    return document, page


def render(comparison: Comparison, folder: Path) -> str:
    """The page as text; `folder` is where the pictures' names start."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        megabytes=_megabytes,
        number=_number,
        percent=_percent,
        points=_points,
        seconds=_seconds,
    )
    return environment.get_template("report.html").render(
        c=comparison,
        reference=comparison.levels[0],
        levels=comparison.levels[1:],
        groups=gallery(comparison, folder),
        speed=plots.speed_plot(comparison),
        steps=plots.step_plot(comparison),
        cosines=plots.cosine_plot(comparison),
        metrics=metrics,
        learned=[
            (name, title)
            for name, title in (("lpips", "LPIPS"), ("clip_score", "CLIP score"))
            if getattr(comparison.levels[0], name) is not None
        ],
        exact_db=EXACT_DB,
        axis_top=plots.AXIS_TOP_DB,
    )


def table(comparison: Comparison, *, width: int = 100, colour: bool = False) -> str:
    """The levels' figures as a table for a terminal, `width` columns wide."""
    from rich.console import Console
    from rich.table import Table

    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=colour, highlight=False)
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    grid.add_column("level", no_wrap=True)
    for heading in _HEADINGS:
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.levels:
        grid.add_row(row.name, *_figures(row), style="dim" if row.reference else "")
    console.print(grid)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


_HEADINGS = (
    "speed",
    "s/image",
    "disk MB",
    "denoiser",
    "RAM MB",
    "SQNR dB",
    "PSNR dB",
    "SSIM",
    "FLIP",
    "adherence",
)


def _figures(row: Row) -> tuple[str, ...]:
    quality: tuple[str, ...] = (_DASH,) * 4
    if not row.reference:
        quality = (
            _number(row.sqnr_db, 1),
            _number(row.psnr_db, 1),
            _number(row.ssim, 3),
            _number(row.flip, 3),
        )
    return (
        f"{row.speedup:.2f}x",
        _seconds(row.seconds_per_image),
        _megabytes(row.bytes),
        f"{row.bytes_vs_fp32:.2f}x",
        _megabytes(row.peak_rss_bytes),
        *quality,
        _DASH if row.adherence is None else f"{_percent(row.adherence)} %",
    )


def _number(value: float | None, digits: int) -> str:
    """Fixed digits; a dash where it wasn't measured."""
    return _DASH if value is None else f"{value:.{digits}f}"


def _megabytes(value: int | None) -> str:
    """Millions of bytes, with a decimal below 100."""
    return _DASH if value is None else f"{value / 1e6:.{1 if value < 1e8 else 0}f}"


def _seconds(value: float) -> str:
    """Seconds with about three digits that count."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _percent(value: float | None) -> str:
    """A share 0..1 as per cent, without the sign."""
    return _DASH if value is None else f"{100 * value:.1f}"


def _points(value: float, reference: float) -> str:
    """The difference of two shares in points, with its sign."""
    return f"{100 * (value - reference):+.1f}".replace("-", "\N{MINUS SIGN}")


def _replace(path: Path, text: str) -> None:
    """Write a whole file or none: a reader never sees half of it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    temporary.replace(path)
