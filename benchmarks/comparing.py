"""Carries out a `kiln compare`: check, build, measure, tally, write, print."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import report
from benchmarks.compare import Wish
from benchmarks.comparison import Comparison
from benchmarks.conditions import activity, conditions
from benchmarks.contestants import Contestant
from benchmarks.gate import check_limits
from benchmarks.learned import find_learned
from benchmarks.measure import Request, measure
from benchmarks.prompts import choose_prompts
from benchmarks.tally import About, Judge, tally
from profiles import hardware
from profiles.errors import DiskFullError, MissingError, SpecError, UnsupportedError
from runners.console import Console, quiet_libraries

if TYPE_CHECKING:
    from optimizer.source import ModelSource

__all__ = ["carry_out", "compare_contestants"]

_SQNR_PROMPTS = 8
"""Trajectories that the SQNR is pooled over; 160 denoiser calls at 20 steps."""

_LIBRARY_BYTES = 500_000_000
"""Resident after importing torch, diffusers and an engine's library (FACTS: 442 MB)."""


def carry_out(wish: Wish, console: Console) -> None:
    """Do all of it; raises KeyboardInterrupt after reporting a run that Ctrl-C ended early."""
    quiet_libraries()
    _check_tools()
    from benchmarks.levels import contestants, level_recipes
    from optimizer.source import resolve
    from optimizer.store import Store

    level_recipes(wish)
    source = resolve(wish.model, revision=wish.revision, console=console)
    if source.kind == "onnx":
        raise UnsupportedError(
            f"{wish.model} is an ONNX export, and plain diffusers, which is compared with, can't "
            "run it: give the model that it was exported from."
        )
    request = _request(wish, source.folder)
    with _writing(wish.out), Store().session(source.folder):
        wish.out.mkdir(parents=True, exist_ok=True)
        comparison = compare_contestants(
            contestants(wish, source, console), request, source, out=wish.out, console=console
        )
        document, page = report.write(comparison, wish.out)
    width = shutil.get_terminal_size((100, 24)).columns
    text = report.table(comparison, width=max(width, 100), colour=sys.stdout.isatty())
    console.result(
        f"{text}\n\n{page}",
        {"report": str(document), "html": str(page), **comparison.summary},
    )
    if not comparison.complete:
        raise KeyboardInterrupt
    check_limits(comparison, wish.limits)


def compare_contestants(
    entrants: Sequence[Contestant],
    request: Request,
    source: ModelSource,
    *,
    out: Path,
    console: Console,
) -> Comparison:
    """Measure and tally; the reference is the first of the contestants."""
    machine, before = hardware.detect(), activity()
    need = _predicted_memory(entrants)
    if need > machine.ram_available_bytes:
        console.info(
            f"All {len(entrants)} processes together may need about {need / 1e9:.1f} GB of memory "
            f"and {machine.ram_available_bytes / 1e9:.1f} GB is free: fewer --levels need less."
        )
    date = datetime.now(UTC)
    measured = measure(entrants, request, images=out / "images", console=console)
    with console.stage("figures"):
        return tally(
            measured,
            entrants,
            about=About(
                model=source.name,
                model_digest=source.digest,
                conditions=conditions(machine, date=date, before=before, after=activity()),
                folder=out,
            ),
            judge=_judge(source.folder),
            learned=find_learned(),
        )


def _predicted_memory(entrants: Sequence[Contestant]) -> float:
    """Bytes of all processes at once: libraries, and weights with half as much for activations.

    The plain pipeline holds in fp32 what may lie on the disk in fp16.
    """
    weights = (
        entrant.bytes * max(1.0, entrant.denoiser_fp32_bytes / entrant.denoiser_bytes)
        if entrant.kind != "bundle"
        else entrant.bytes
        for entrant in entrants
    )
    return sum(_LIBRARY_BYTES + 1.5 * size for size in weights)


def _request(wish: Wish, model: Path) -> Request:
    """The wish with the model's own settings where the user gave none."""
    prompts, prompts_source = choose_prompts(model, file=wish.prompts, count=wish.count)
    own = _own_settings(model / "kiln.json")
    return Request(
        prompts=prompts,
        prompts_source=prompts_source,
        seeds=wish.seeds,
        steps=own.get("steps") if wish.steps is None else wish.steps,
        guidance=own.get("guidance") if wish.guidance is None else wish.guidance,
        threads=wish.threads or hardware.detect().cpu.cores,
        sqnr_prompts=_SQNR_PROMPTS,
    )


def _own_settings(file: Path) -> dict[str, int]:
    """Steps and guidance that the model's makers recommend, in a kiln.json beside the model."""
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SpecError(f"{file} is no JSON ({error}): mend it or delete it") from error
    return settings if isinstance(settings, dict) else {}


def _judge(model: Path) -> Judge | None:
    """The model's own measure of caption adherence, where its folder has one."""
    if not (model / "adherence").is_dir():
        return None
    from benchmarks.reference_model.adherence import Adherence

    return Adherence.load(model)


def _check_tools() -> None:
    for module in ("jinja2", "skimage"):
        if find_spec(module) is None:
            raise MissingError(
                f"kiln compare needs {module}, which isn't installed: "
                'pip install "kiln-diffusion[bench]"'
            )


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Give the operating system's refusals to write below `out` their sentence."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = hardware.free_disk_bytes(out)
            raise DiskFullError(
                f"the disk of {out} is full ({free / 1e6:.0f} MB free): free some, or name a "
                "folder on another disk with -o"
            ) from error
        if error.filename is None or not str(error.filename).startswith(str(out)):
            raise
        raise SpecError(
            f"can't write to {out} ({error.strerror}): name another folder with -o"
        ) from error
