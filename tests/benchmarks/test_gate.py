"""`--fail-under`: what can be limited, and what a failure says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.comparison import Comparison
from benchmarks.gate import check_limits, parse_limits
from benchmarks.measure import Measured
from profiles.errors import ParityError, SpecError

Make = Callable[..., Measured]
Tally = Callable[..., Comparison]


def test_limits_are_read() -> None:
    assert parse_limits("psnr=30, sqnr=27.5,adherence=0.9") == {
        "psnr": 30.0,
        "sqnr": 27.5,
        "adherence": 0.9,
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("flip=0.1", "--fail-under names 'flip'; use psnr, ssim, sqnr, adherence, such as "),
        ("", "--fail-under names ''; use psnr"),
        ("psnr", "--fail-under psnr needs a number after the ="),
        ("psnr=high", "--fail-under psnr=high needs a number after the ="),
    ],
)
def test_wrong_limits_say_how_to_write_them(text: str, sentence: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_limits(text)
    assert str(caught.value).startswith(sentence)


def test_only_a_limit_above_the_lowest_level_fails(
    measurement: Make, compare_measured: Tally
) -> None:
    comparison = compare_measured(measurement("one", "two"))
    lowest = min(level.psnr_db for level in comparison.levels[1:])
    check_limits(comparison, {})
    check_limits(comparison, {"psnr": lowest, "sqnr": 10})
    with pytest.raises(ParityError, match="psnr"):
        check_limits(comparison, {"psnr": lowest + 0.01, "sqnr": 10})


def test_a_level_below_a_limit_is_named_with_its_worst_prompt(
    measurement: Make, compare_measured: Tally
) -> None:
    """The pictures' noise grows with the prompt's index, and int4's is the larger."""
    comparison = compare_measured(measurement("the first", "the second"))
    int8 = comparison.levels[1].psnr_db
    with pytest.raises(ParityError) as caught:
        check_limits(comparison, {"psnr": int8 - 1})
    sentence = str(caught.value)
    assert sentence.startswith("int4 reaches psnr ")
    assert f"asks for {int8 - 1:g}; the worst prompt is 'the second' with " in sentence
    assert caught.value.exit_code == 16


def test_a_measure_of_no_single_picture_names_none(
    measurement: Make, compare_measured: Tally
) -> None:
    with pytest.raises(ParityError) as caught:
        check_limits(compare_measured(measurement("one")), {"sqnr": 25})
    assert str(caught.value) == "int4 reaches sqnr 20, and --fail-under asks for 25."


def test_what_was_not_measured_fails(measurement: Make, compare_measured: Tally) -> None:
    with pytest.raises(ParityError, match="adherence of int8 wasn't measured"):
        check_limits(compare_measured(measurement("one")), {"adherence": 0.1})
