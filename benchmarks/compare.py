"""`kiln compare`: all levels of a model beside the plain diffusers pipeline, in one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import click

from benchmarks.baselines import Baseline
from benchmarks.gate import parse_limits
from profiles.errors import SpecError
from runners.console import Console

__all__ = ["Wish", "compare"]


@dataclass(frozen=True)
class Wish:
    """The command line, checked as far as that goes without the model."""

    model: str
    out: Path
    levels: tuple[str, ...]
    revision: str | None = None
    prompts: Path | None = None
    count: int | None = None
    seeds: int = 1
    steps: int | None = None
    guidance: float | None = None
    backend: str | None = None
    threads: int | None = None
    baselines: tuple[Baseline, ...] = ()
    """The plain pipeline in other people's ways."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Measure -> the least that every level must reach."""

    def __post_init__(self) -> None:
        """Raise SpecError for what no model could be asked for."""
        if not self.levels:
            raise SpecError("--levels names no level: give some, such as --levels none,int8,int4")
        known = get_args(Baseline)
        if unknown := sorted(set(self.baselines) - set(known)):
            raise SpecError(f"--baselines names {unknown[0]!r}: use {', '.join(known)}")
        twice = sorted({level for level in self.levels if self.levels.count(level) > 1})
        if twice:
            raise SpecError(f"--levels names {twice[0]} twice: name each level once")
        for option, value in (
            ("--seeds", self.seeds),
            ("--steps", self.steps),
            ("--threads", self.threads),
            ("--count", self.count),
        ):
            if value is not None and value < 1:
                raise SpecError(f"{option} is {value}; it must be at least 1")
        if self.guidance is not None and not 0 <= self.guidance < float("inf"):
            raise SpecError(f"--guidance is {self.guidance:g}; it must be 0 or more, such as 7.5")


@click.command("compare")
@click.argument("model")
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder for the report."
)
@click.option(
    "--levels",
    default="none,int8,int4",
    show_default=True,
    help="Values of --quant, also auto:0.2x, auto:30db, int4:hqq.",
)
@click.option("--revision", help="Revision of a hub model.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Text file, a prompt a line; all are used.  [default: 16 of the model's own list]",
)
@click.option("--count", type=int, help="Use this many of the prompts, evenly spread.")
@click.option("--seeds", type=int, default=1, show_default=True, help="Pictures a prompt.")
@click.option("--steps", type=int, help="Denoising steps.  [default: the model's]")
@click.option("--guidance", type=float, help="Guidance scale.  [default: the model's]")
@click.option("--backend", help="Backend of every level.  [default: by the machine]")
@click.option(
    "--baselines", help=f"Rows of plain diffusers in other ways: {', '.join(get_args(Baseline))}."
)
@click.option("--threads", type=int, help="Threads of every process.  [default: all cores]")
@click.option(
    "--fail-under",
    metavar="MEASURE=LIMIT,...",
    help="Exit 16 where a level is below: psnr, ssim, sqnr (dB), adherence (0..1).",
)
@click.option("--json", "json_output", is_flag=True, help="One JSON line on stdout.")
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
def compare(
    model: str,
    *,
    out: Path,
    levels: str,
    revision: str | None,
    prompts: Path | None,
    count: int | None,
    seeds: int,
    steps: int | None,
    guidance: float | None,
    backend: str | None,
    baselines: str | None,
    threads: int | None,
    fail_under: str | None,
    json_output: bool,
    verbose: bool,
) -> None:
    """Compare MODEL's quantization levels with diffusers: speed, memory, size, quality.

    Builds the bundles that are missing (into OUT/bundles), makes the same pictures with all levels
    and with the plain fp32 pipeline in turns, and writes OUT/report.html, OUT/report.json and
    OUT/images. Ctrl-C ends it early and reports what was finished.
    """
    wish = Wish(
        model=model,
        out=out,
        levels=_listed(levels),
        revision=revision,
        prompts=prompts,
        count=count,
        seeds=seeds,
        steps=steps,
        guidance=guidance,
        backend=backend,
        baselines=_listed(baselines or ""),  # type: ignore[arg-type]
        threads=threads,
        limits={} if fail_under is None else parse_limits(fail_under),
    )
    from benchmarks.comparing import carry_out

    carry_out(wish, Console(json_output=json_output, verbose=verbose))


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
