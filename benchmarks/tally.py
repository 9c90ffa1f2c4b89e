"""Turns what was measured into a `Comparison`: distances, adherence, medians, ratios, notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from benchmarks.comparison import Comparison, Conditions, NoiseFloor, Picture, Row, Shot
from benchmarks.contestants import REFERENCE, Contestant
from benchmarks.learned import NO_MEASURES, Learned
from benchmarks.measure import Measured, Taken
from benchmarks.metrics import Picture as Pixels
from benchmarks.metrics import (
    PictureDistance,
    StepSqnr,
    bootstrap_interval,
    picture_distance,
)
from optimizer.numerics import EXACT_DB
from profiles.errors import SpecError

__all__ = ["About", "Judge", "Judgement", "tally"]

_BUSY = 0.1
"""Share of the processor that others use above which the reader is told."""


class Judgement(Protocol):
    """What a judge says of a set of pictures."""

    @property
    def mean(self) -> float:
        """0..1, over the attributes."""
        ...

    @property
    def attributes(self) -> Mapping[str, float]:
        """0..1 each."""
        ...

    @property
    def per_image(self) -> Sequence[float]:
        """0..1 for each picture."""
        ...


class Judge(Protocol):
    """The model's own measure of how well pictures show what their captions say."""

    def score(self, images: Sequence[Any], captions: Sequence[str]) -> Judgement:
        """Judge picture i by caption i; SpecError for captions it can't read."""
        ...


@dataclass(frozen=True)
class About:
    """What the measurement itself doesn't know."""

    model: str
    model_digest: str
    conditions: Conditions
    folder: Path
    """The report's folder; pictures lie in it."""
    notes: tuple[str, ...] = ()


def tally(
    measured: Measured,
    contestants: Sequence[Contestant],
    *,
    about: About,
    judge: Judge | None = None,
    learned: Learned = NO_MEASURES,
) -> Comparison:
    """Make the document; the contestants in the order of its rows, the reference first."""
    distances = {c.name: _distances(measured, c.name, learned) for c in contestants}
    judgements, judge_notes = _judge(judge, measured, [c.name for c in contestants])
    rows = tuple(
        _row(contestant, measured, distances[contestant.name], judgements.get(contestant.name))
        for contestant in contestants
    )
    return Comparison(
        model=about.model,
        model_digest=about.model_digest,
        complete=measured.complete,
        settings=measured.settings,
        conditions=about.conditions,
        levels=rows,
        noise_floor=_noise_floor(rows, contestants),
        pictures=_pictures(measured, distances, judgements, about.folder),
        notes=(*about.notes, *_notes(measured, rows, about.conditions), *judge_notes),
    )


def _pixels(taken: Taken) -> Pixels:
    with Image.open(taken.path) as picture:
        return np.asarray(picture.convert("RGB"))


@dataclass(frozen=True)
class _Distance(PictureDistance):
    lpips: float | None = None
    clip_score: float | None = None


def _distances(measured: Measured, name: str, learned: Learned) -> list[_Distance]:
    """Of one contestant's pictures, all in memory at once where CLIP reads them."""
    scores: list[float] | None = None
    if learned.clip_score is not None:
        pictures = [_pixels(taken[name]) for _, taken in measured.rounds]
        scores = learned.clip_score(pictures, [task.prompt for task, _ in measured.rounds])
    found = []
    for index, (_, taken) in enumerate(measured.rounds):
        reference, picture = _pixels(taken[REFERENCE]), _pixels(taken[name])
        plain = picture_distance(reference, picture)
        found.append(
            _Distance(
                **vars(plain),
                lpips=None if learned.lpips is None else learned.lpips(reference, picture),
                clip_score=None if scores is None else scores[index],
            )
        )
    return found


def _pictures(
    measured: Measured,
    distances: Mapping[str, Sequence[_Distance]],
    judgements: Mapping[str, Judgement],
    folder: Path,
) -> tuple[Picture, ...]:
    return tuple(
        Picture(
            prompt=task.prompt,
            seed=task.seed,
            shots={
                name: Shot(
                    file=shot.path.relative_to(folder).as_posix(),
                    seconds=shot.seconds,
                    psnr_db=distances[name][index].psnr_db,
                    ssim=distances[name][index].ssim,
                    flip=distances[name][index].flip,
                    lpips=distances[name][index].lpips,
                    clip_score=distances[name][index].clip_score,
                    adherence=judgements[name].per_image[index] if name in judgements else None,
                )
                for name, shot in taken.items()
            },
        )
        for index, (task, taken) in enumerate(measured.rounds)
    )


def _row(
    contestant: Contestant,
    measured: Measured,
    distances: Sequence[_Distance],
    judgement: Judgement | None,
) -> Row:
    name, reference = contestant.name, contestant.name == REFERENCE
    seconds = np.array([taken[name].seconds for _, taken in measured.rounds])
    baseline = np.array([taken[REFERENCE].seconds for _, taken in measured.rounds])
    psnr = [distance.psnr_db for distance in distances]
    steps, pooled = _sqnr(measured.sqnr.get(name), reference=reference)
    return Row(
        name=name,
        reference=reference,
        backend=contestant.backend,
        dtype=contestant.dtype,
        digest=contestant.digest,
        bytes=contestant.bytes,
        denoiser_bytes=contestant.denoiser_bytes,
        denoiser_fp32_bytes=contestant.denoiser_fp32_bytes,
        bytes_vs_fp32=contestant.denoiser_bytes / contestant.denoiser_fp32_bytes,
        ready_seconds=measured.ready_seconds[name],
        seconds_per_image=float(np.median(seconds)),
        seconds_quartiles=_quartiles(seconds),
        speedup=float(np.median(baseline) / np.median(seconds)),
        speedup_quartiles=_quartiles(baseline / seconds),
        peak_rss_bytes=measured.peaks.get(name),
        psnr_db=float(np.mean(psnr)),
        ssim=_mean([distance.ssim for distance in distances]),
        flip=_mean([distance.flip for distance in distances]),
        lpips=_mean([distance.lpips for distance in distances]),
        clip_score=_mean([distance.clip_score for distance in distances]),
        sqnr_db=pooled,
        sqnr_db_per_step=steps,
        latent_cosine_per_step=_cosines(measured.cosines.get(name, [])),
        texture=_texture(distances),
        banding=_mean_known([distance.slope_error for distance in distances]),
        intervals=_intervals(distances, judgement),
        adherence=None if judgement is None else float(judgement.mean),
        adherence_attributes={}
        if judgement is None
        else {key: float(value) for key, value in judgement.attributes.items()},
        worst=None if reference else int(np.argmin(psnr)),
    )


def _cosines(runs: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The mean over runs, step by step."""
    return tuple(float(value) for value in np.mean(runs, axis=0)) if runs else ()


def _texture(distances: Sequence[PictureDistance]) -> float | None:
    """Pooled over the pictures: plain ones have next to no texture of their own."""
    own, wanted = (sum(d.high_band[i] for d in distances) for i in (0, 1))
    return own / wanted if wanted > 0 else None


def _intervals(
    distances: Sequence[_Distance], judgement: Judgement | None
) -> dict[str, tuple[float, float]]:
    values: dict[str, Sequence[float | None]] = {
        "psnr_db": [distance.psnr_db for distance in distances],
        "ssim": [distance.ssim for distance in distances],
        "flip": [distance.flip for distance in distances],
        "lpips": [distance.lpips for distance in distances],
        "clip_score": [distance.clip_score for distance in distances],
        "adherence": [] if judgement is None else list(judgement.per_image),
    }
    found = {}
    for name, measures in values.items():
        known = [value for value in measures if value is not None]
        interval = bootstrap_interval(known) if len(known) == len(measures) else None
        if interval is not None:
            found[name] = interval
    return found


def _noise_floor(rows: Sequence[Row], contestants: Sequence[Contestant]) -> NoiseFloor | None:
    """The unquantized level, unless it computes in fp32 as the reference does."""
    plain = {c.name for c in contestants if c.quant == "none" and c.dtype != "fp32"}
    row = next((row for row in rows if row.name in plain), None)
    if row is None:
        return None
    return NoiseFloor(
        level=row.name,
        dtype=row.dtype,
        psnr_db=row.psnr_db,
        ssim=row.ssim,
        flip=row.flip,
        sqnr_db=row.sqnr_db,
        adherence=row.adherence,
    )


def _sqnr(sums: StepSqnr | None, *, reference: bool) -> tuple[tuple[float, ...], float | None]:
    """Per step and pooled; the reference equals itself."""
    if reference:
        return (), EXACT_DB
    return ((), None) if sums is None else (sums.per_step_db, sums.pooled_db)


def _judge(
    judge: Judge | None, measured: Measured, names: Sequence[str]
) -> tuple[dict[str, Judgement], tuple[str, ...]]:
    """Each contestant's judgement and what to tell the reader; one's pictures at a time."""
    if judge is None:
        return {}, ()
    captions = [task.prompt for task, _ in measured.rounds]
    judgements = {}
    for name in names:
        pictures = [Image.fromarray(_pixels(taken[name])) for _, taken in measured.rounds]
        try:
            judgements[name] = judge.score(pictures, captions)
        except SpecError as error:
            return {}, (
                f"Caption adherence wasn't measured: {str(error).split('; ')[0].rstrip('.')}.",
            )
    return judgements, ()


def _notes(measured: Measured, rows: Sequence[Row], conditions: Conditions) -> list[str]:
    notes = []
    if not measured.complete:
        total = len(measured.settings.prompts) * measured.settings.seeds
        notes.append(
            f"Interrupted: {len(measured.rounds)} of {total} pictures are counted for every row, "
            "and the SQNR, which comes after the pictures, may be missing."
        )
    for row in rows:
        sums = measured.sqnr.get(row.name)
        if sums is not None and not sums.finite:
            notes.append(f"{row.name}: the denoiser gave NaN or Infinity; it is broken.")
    if any(row.flip is None for row in rows):
        notes.append("FLIP wasn't measured: pip install flip-evaluator.")
    busy = max(conditions.before.cpu_share, conditions.after.cpu_share)
    if busy > _BUSY:
        notes.append(
            f"The machine was busy: other programs used {100 * busy:.0f} % of its processor, so "
            "the speeds can't be relied on; they hit threads that wait for each other hardest."
        )
    return notes


def _quartiles(values: Any) -> tuple[float, float]:
    low, high = np.quantile(values, [0.25, 0.75])
    return float(low), float(high)


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
