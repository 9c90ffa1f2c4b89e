from __future__ import annotations

import math

import numpy as np
import pytest

from optimizer.check import limit_db
from optimizer.numerics import EXACT_DB, Sqnr, sqnr_db


def test_equality_is_200_db() -> None:
    array = np.arange(6, dtype=np.float32)
    assert sqnr_db([(array, array)]) == EXACT_DB == 200


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_minus_200_db(bad: float) -> None:
    output = np.array([1.0, bad])
    assert sqnr_db([(np.ones(2), np.ones(2)), (np.ones(2), output)]) == -200
    assert sqnr_db([(output, np.ones(2))]) == -200


def test_an_error_of_a_tenth_is_20_db() -> None:
    reference = np.full(10, 2.0)
    assert sqnr_db([(reference, reference * 0.9)]) == pytest.approx(20)


def test_signal_and_error_are_pooled_before_the_ratio() -> None:
    pooled = Sqnr()
    pooled.add(np.array([10.0]), np.array([10.0]))
    pooled.add(np.array([0.0]), np.array([1.0]))
    assert pooled.db == pytest.approx(20)


def test_error_without_signal_is_minus_200_db() -> None:
    assert sqnr_db([(np.zeros(3), np.ones(3))]) == -200


def test_sums_do_not_lose_what_float32_would() -> None:
    reference = np.full(10, 1e4, np.float32)
    output = reference.copy()
    output[0] += 1e-2
    expected = 10 * math.log10(10 * 1e8 / float(output[0] - reference[0]) ** 2)
    assert sqnr_db([(reference, output)]) == pytest.approx(expected)


def test_a_limit_allows_the_oracles_loss_the_dtypes_and_one_db() -> None:
    assert limit_db(EXACT_DB, "fp32") == pytest.approx(79)
    assert limit_db(30, "fp32") == pytest.approx(29, abs=0.01)
    assert limit_db(28, "bf16") == pytest.approx(28 - 10 * math.log10(2) - 1)
