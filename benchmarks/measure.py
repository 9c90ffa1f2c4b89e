"""Runs the contestants: interleaved pictures, then denoiser outputs on one recorded trajectory.

For every prompt and seed each contestant makes one picture, in an order that rotates, so that a
machine that slows down slows everybody down. Then the plain pipeline's denoiser calls are recorded
for some prompts and every other contestant's denoiser is given the very same inputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks.comparison import Settings
from benchmarks.contestants import Asked, Contestant, Worker
from benchmarks.metrics import StepSqnr
from runners.console import Console, Stage

__all__ = ["Measured", "Request", "Start", "Taken", "Task", "measure"]

Start = Callable[[Contestant, Path, int], Asked]
"""(contestant, private folder, threads) -> its worker."""

_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Request:
    """What the user asked for; None means the pipeline's own default."""

    prompts: tuple[str, ...]
    prompts_source: str
    seeds: int
    steps: int | None
    guidance: float | None
    threads: int
    sqnr_prompts: int


@dataclass(frozen=True)
class Task:
    """One picture to make."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Taken:
    """One picture made."""

    path: Path
    seconds: float


@dataclass
class Measured:
    """What the workers said; filled as they go, so that an interruption keeps what was finished."""

    settings: Settings
    loaded: Mapping[str, Mapping[str, Any]]
    """Each contestant's answer to "load"."""
    ready_seconds: Mapping[str, float]
    """From the start of loading to the end of the picture that isn't counted."""
    rounds: list[tuple[Task, dict[str, Taken]]] = field(default_factory=list)
    """Tasks that every contestant finished."""
    peaks: dict[str, int | None] = field(default_factory=dict)
    sqnr: dict[str, StepSqnr] = field(default_factory=dict)
    """By contestant, the reference aside."""
    cosines: dict[str, list[list[float]]] = field(default_factory=dict)
    """By contestant, a list a picture: cosine of the latents to the reference's after each step."""
    complete: bool = False


def start_worker(contestant: Contestant, folder: Path, threads: int) -> Asked:
    """Start the real thing: a child process."""
    return Worker(contestant, folder=folder, threads=threads)


def measure(
    contestants: Sequence[Contestant],
    request: Request,
    *,
    images: Path,
    console: Console,
    start: Start = start_worker,
) -> Measured:
    """Measure all contestants, the reference first among them, pictures into `images`/NAME.

    Ctrl-C ends it early and is no error here: `complete` is False and `rounds` has what every
    contestant had finished. Before the first picture it is raised as usual.
    """
    with ExitStack() as stack:
        scratch = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="kiln-compare-", ignore_cleanup_errors=True)
            )
        )
        workers = [
            stack.enter_context(closing(start(contestant, scratch, request.threads)))
            for contestant in contestants
        ]
        loaded = _load(workers, contestants, request.threads, console)
        settings = _settings(request, loaded[workers[0].name])
        measured = Measured(settings, loaded, _warm_up(workers, settings, loaded, scratch))
        try:
            _make_pictures(workers, measured, _folders(contestants, images), console)
            _force(workers, measured, scratch, console)
            measured.complete = True
        except KeyboardInterrupt:
            if not measured.rounds:
                raise
        return measured


def tasks(prompts: Sequence[str], seeds: int) -> Iterator[Task]:
    """Every prompt `seeds` times; seeds count up over the whole run, as those of a batch do."""
    for index in range(len(prompts) * seeds):
        yield Task(prompts[index // seeds], index)


def _load(
    workers: Sequence[Asked], contestants: Sequence[Contestant], threads: int, console: Console
) -> dict[str, dict[str, Any]]:
    """Load one after another: each has the machine to itself."""
    answers = {}
    with console.stage("load", len(workers)) as stage:
        for worker, contestant in zip(workers, contestants, strict=True):
            answers[worker.name] = worker.ask(
                {
                    "op": "load",
                    "kind": contestant.kind,
                    "path": str(contestant.path),
                    "threads": threads,
                }
            )
            stage.advance()
    return answers


def _settings(request: Request, loaded: Mapping[str, Any]) -> Settings:
    steps, guidance = request.steps, request.guidance
    return Settings(
        prompts=request.prompts,
        prompts_source=request.prompts_source,
        seeds=request.seeds,
        steps=loaded["steps"] if steps is None else steps,
        guidance=loaded["guidance"] if guidance is None else guidance,
        threads=request.threads,
        sqnr_prompts=min(request.sqnr_prompts, len(request.prompts)),
    )


def _warm_up(
    workers: Sequence[Asked],
    settings: Settings,
    loaded: Mapping[str, Mapping[str, Any]],
    scratch: Path,
) -> dict[str, float]:
    """One short picture each that isn't counted: engines open, memory is touched."""
    ready: dict[str, float] = {}
    for worker in workers:
        picture = scratch / f"{len(ready)}.png"
        request = _picture_request(Task(settings.prompts[0], 0), settings, picture)
        answer = worker.ask({**request, "steps": min(_WARM_UP_STEPS, settings.steps)})
        ready[worker.name] = loaded[worker.name]["load_seconds"] + answer["seconds"]
    return ready


def _make_pictures(
    workers: Sequence[Asked], measured: Measured, folders: Mapping[str, Path], console: Console
) -> None:
    settings = measured.settings
    total = len(settings.prompts) * settings.seeds * len(workers)
    with console.stage("pictures", total) as stage:
        for index, task in enumerate(tasks(settings.prompts, settings.seeds)):
            turn = index % len(workers)
            taken = {}
            for worker in (*workers[turn:], *workers[:turn]):
                path = folders[worker.name] / f"{index + 1:04d}.png"
                answer = worker.ask(_picture_request(task, settings, path))
                taken[worker.name] = Taken(path, answer["seconds"])
                stage.advance()
            measured.peaks = {w.name: w.ask({"op": "peak"})["peak_rss_bytes"] for w in workers}
            measured.rounds.append((task, taken))
            stage.note(f"{len(measured.rounds) * len(workers)} made")


def _force(workers: Sequence[Asked], measured: Measured, scratch: Path, console: Console) -> None:
    """Teacher forcing: the reference's recorded denoiser inputs, replayed by all others.

    Then the same pictures once more, everybody running freely, for their latents.
    """
    settings = measured.settings
    reference, *others = workers
    chosen = list(tasks(settings.prompts, settings.seeds))[:: settings.seeds]
    with console.stage(
        "teacher-forced SQNR and latents", settings.sqnr_prompts * len(workers)
    ) as stage:
        for task in chosen[: settings.sqnr_prompts]:
            with tempfile.TemporaryDirectory(dir=scratch) as parent:
                folder = Path(parent, "calls")
                request = _picture_request(task, settings, folder)
                reference.ask({**request, "op": "record", "folder": str(folder)})
                stage.advance()
                _replay(others, measured.sqnr, folder, stage)
                _run_freely(workers, measured, request, Path(parent))


def _replay(others: Sequence[Asked], sqnr: dict[str, StepSqnr], folder: Path, stage: Stage) -> None:
    for worker in others:
        answer = worker.ask({"op": "replay", "folder": str(folder)})
        sums = sqnr.setdefault(worker.name, StepSqnr())
        for step, (signal, noise) in enumerate(zip(answer["signal"], answer["noise"], strict=True)):
            sums.add(step, signal=signal, noise=noise)
        stage.advance()


def _run_freely(
    workers: Sequence[Asked], measured: Measured, request: dict[str, Any], folder: Path
) -> None:
    """Latents of one picture by everybody, compared with the reference's step by step."""
    wanted: Any = None
    for number, worker in enumerate(workers):
        path = folder / f"{number}.safetensors"
        worker.ask({**request, "op": "trajectory", "path": str(path)})
        latents = load_file(path)["latents"].astype(np.float64)
        if wanted is None:
            wanted = latents
            continue
        size = np.linalg.norm(latents, axis=1) * np.linalg.norm(wanted, axis=1)
        cosine = (latents * wanted).sum(axis=1) / np.maximum(size, 1e-30)
        measured.cosines.setdefault(worker.name, []).append(np.nan_to_num(cosine).tolist())


def _picture_request(task: Task, settings: Settings, path: Path) -> dict[str, Any]:
    return {
        "op": "image",
        "prompt": task.prompt,
        "seed": task.seed,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "path": str(path),
    }


def _folders(contestants: Sequence[Contestant], images: Path) -> dict[str, Path]:
    """Each contestant's folder of pictures, emptied of an earlier run's."""
    folders = {contestant.name: images / contestant.slug for contestant in contestants}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("[0-9]" * 4 + ".png"):
            old.unlink()
    return folders
