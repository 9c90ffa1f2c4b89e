"""From measurements to rows: medians, ratios, caps, nulls and what the reader is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Any

import pytest

from benchmarks.comparison import Comparison
from benchmarks.contestants import REFERENCE, Contestant
from benchmarks.measure import Measured
from profiles.errors import SpecError

Make = Callable[..., Measured]
Tally = Callable[..., Comparison]


@dataclass(frozen=True)
class Score:
    mean: float = 0.9
    attributes: Any = None
    per_image: Sequence[float] = (0.8, 1.0)


class Judge:
    def score(self, images: Sequence[Any], captions: Sequence[str]) -> Score:
        assert [image.size for image in images] == [(16, 16)] * len(captions)
        return Score(attributes={"shape": 0.9})


class Puzzled:
    def score(self, _images: Sequence[Any], captions: Sequence[str]) -> Score:
        raise SpecError(f"cannot read {captions[0]!r}; legal captions are many")


def test_speed_is_a_ratio_of_medians_and_size_one_of_denoisers(
    measurement: Make, compare_measured: Tally
) -> None:
    reference, int8, int4 = compare_measured(measurement("a", "b", "c")).levels
    assert int8.seconds_per_image == pytest.approx(0.6)
    assert int8.speedup == pytest.approx(3.0)
    assert int8.speedup_quartiles == (pytest.approx(3.0), pytest.approx(3.0))
    assert (int8.bytes_vs_fp32, int4.bytes_vs_fp32) == (0.25, 0.2)
    assert (reference.name, reference.reference, reference.speedup) == (REFERENCE, True, 1.0)


def test_the_reference_equals_itself_by_the_stated_caps(
    measurement: Make, compare_measured: Tally
) -> None:
    row = compare_measured(measurement("a")).levels[0]
    assert (row.psnr_db, row.ssim, row.flip, row.sqnr_db) == (100.0, 1.0, 0.0, 200.0)
    assert row.worst is None


def test_sqnr_is_given_pooled_and_by_step(measurement: Make, compare_measured: Tally) -> None:
    int8 = compare_measured(measurement("a")).levels[1]
    assert int8.sqnr_db == pytest.approx(30.0)
    assert int8.sqnr_db_per_step == (pytest.approx(30.0),) * 3


def test_the_worst_picture_is_the_one_farthest_from_the_reference(
    measurement: Make, compare_measured: Tally
) -> None:
    comparison = compare_measured(measurement("a", "b", "c"))
    assert [row.worst for row in comparison.levels] == [None, 2, 2]
    assert comparison.pictures[2].shots["int4"].file == "images/int4/0003.png"


def test_an_interrupted_run_says_how_far_it_came(
    measurement: Make, compare_measured: Tally
) -> None:
    result = measurement("a", "b", "c")
    result.rounds.pop()
    result.complete, result.peaks, result.sqnr = False, {}, {}
    comparison = compare_measured(result)
    assert not comparison.complete
    assert len(comparison.pictures) == 2
    assert comparison.levels[1].sqnr_db is None
    assert comparison.levels[1].peak_rss_bytes is None
    assert "2 of 3 pictures" in comparison.notes[0]


def test_a_nan_of_the_denoiser_is_the_lowest_sqnr_and_said(
    measurement: Make, compare_measured: Tally
) -> None:
    result = measurement("a")
    result.sqnr["int4"].add(1, signal=1.0, noise=nan)
    comparison = compare_measured(result)
    assert comparison.levels[2].sqnr_db == -200.0
    assert comparison.levels[2].sqnr_db_per_step[1] == -200.0
    assert any("int4: the denoiser gave NaN" in note for note in comparison.notes)


def test_a_busy_machine_is_said_and_a_quiet_one_is_not(
    measurement: Make, compare_measured: Tally
) -> None:
    result = measurement("a")
    assert (
        "other programs used 60 % of its processor" in compare_measured(result, busy=0.6).notes[0]
    )
    assert compare_measured(result, busy=0.02).notes == ()


def test_adherence_is_judged_for_every_contestant(
    measurement: Make, compare_measured: Tally
) -> None:
    comparison = compare_measured(measurement("a", "b"), judge=Judge())
    assert [row.adherence for row in comparison.levels] == [0.9] * 3
    assert comparison.levels[1].adherence_attributes == {"shape": 0.9}
    assert comparison.pictures[0].shots["int8"].adherence == 0.8


def test_captions_that_the_judge_cannot_read_leave_adherence_null_with_the_reason(
    measurement: Make, compare_measured: Tally
) -> None:
    comparison = compare_measured(measurement("a"), judge=Puzzled())
    assert [row.adherence for row in comparison.levels] == [None] * 3
    assert comparison.notes == ("Caption adherence wasn't measured: cannot read 'a'.",)


def test_the_unquantized_level_is_the_noise_floor(
    measurement: Make, entrants: tuple[Contestant, ...], compare_measured: Tally
) -> None:
    from benchmarks.tally import _noise_floor

    rows = compare_measured(measurement("one", "two")).levels
    assert _noise_floor(rows, entrants) is None
    plain = [replace(entrants[0]), replace(entrants[1], quant="none"), entrants[2]]
    floor = _noise_floor(rows, plain)
    assert floor is not None
    assert (floor.level, floor.dtype, floor.psnr_db) == ("int8", "bf16", rows[1].psnr_db)
    same = [entrants[0], replace(entrants[1], quant="none", dtype="fp32"), entrants[2]]
    assert _noise_floor(rows, same) is None


def test_latents_are_averaged_over_runs_and_intervals_hold_the_means(
    measurement: Make, compare_measured: Tally
) -> None:
    result = measurement("one", "two", "three", side=32)
    result.cosines["int8"] = [[1.0, 0.9], [0.8, 0.7]]
    reference, int8, int4 = compare_measured(result).levels
    assert int8.latent_cosine_per_step == pytest.approx((0.9, 0.8))
    assert int4.latent_cosine_per_step == reference.latent_cosine_per_step == ()
    for row in (int8, int4):
        low, high = row.intervals["psnr_db"]
        assert low <= row.psnr_db <= high
        assert "adherence" not in row.intervals
    assert int4.texture is None, "plain grey pictures have no texture to keep"
