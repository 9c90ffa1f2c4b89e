"""Sensitivities and a goal -> the best policy, checked against all possible ones."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from optimizer.quantize.budget import Costs, Goal, front, solve
from optimizer.quantize.schemes import KEEP, W4A16, W8A8, Scheme
from optimizer.quantize.sensitivity import (
    LayerLosses,
    Loss,
    Sensitivity,
    load_sensitivity,
    sqnr_of,
)
from profiles.errors import SpecError

COSTS = Costs(float_bytes=2, fixed_bytes=1000, fp32_bytes=4 * 6 * 64 * 64)
NOISES = {"a": 1e-4, "b": 3e-3, "c": 2e-5, "d": 8e-4, "e": 1e-6, "f": 5e-4}


def losses(noise: float) -> LayerLosses:
    return LayerLosses(
        shape=(64, 64),
        losses=(
            Loss(scheme=W8A8(), noise=noise / 50),
            Loss(scheme=W4A16(), noise=noise),
            Loss(scheme=W4A16(group=32), noise=noise / 2),
        ),
    )


SENSITIVITY = Sensitivity(
    model_digest="0" * 64,
    component="unet",
    solver="gptq",
    calls=8,
    layers={name: losses(noise) for name, noise in NOISES.items()},
)


def options(name: str) -> list[tuple[Scheme, int, float]]:
    found = [(loss.scheme, loss.noise) for loss in SENSITIVITY.layers[name].losses]
    return [(s, s.stored_bytes((64, 64), 2), noise) for s, noise in [*found, (KEEP, 0.0)]]


def all_policies() -> list[tuple[int, float]]:
    """Bytes and noise of every assignment."""
    return [
        (1000 + sum(size for _, size, _ in taken), sum(noise for _, _, noise in taken))
        for taken in itertools.product(*(options(name) for name in NOISES))
    ]


@pytest.mark.parametrize("share", [0.15, 0.2, 0.26, 0.33, 0.4, 0.6])
def test_no_policy_of_that_size_loses_less(share: float) -> None:
    limit = int(share * COSTS.fp32_bytes)
    solved = solve(SENSITIVITY, Goal(bytes=limit), COSTS)
    best = min(noise for size, noise in all_policies() if size <= limit)
    assert solved.bytes <= limit
    assert solved.db == pytest.approx(sqnr_of(best), abs=0.01)
    assert solved.ratio == pytest.approx(solved.bytes / COSTS.fp32_bytes)


@pytest.mark.parametrize("db", [26.0, 30.0, 36.0, 45.0])
def test_no_policy_of_that_quality_is_smaller(db: float) -> None:
    solved = solve(SENSITIVITY, Goal(db=db), COSTS)
    least = min(size for size, noise in all_policies() if sqnr_of(noise) >= db)
    assert solved.db >= db - 1e-6
    assert solved.bytes == least


def test_the_policy_gives_each_layer_what_was_chosen() -> None:
    solved = solve(SENSITIVITY, Goal(bytes=int(0.26 * COSTS.fp32_bytes)), COSTS)
    schemes = [solved.policy.scheme(name, (64, 64)) for name in NOISES]
    size = 1000 + sum(scheme.stored_bytes((64, 64), 2) for scheme in schemes)
    assert size == solved.bytes
    assert solved.policy.solver == "gptq"
    labels = [scheme.label for scheme in schemes]
    assert solved.counts == {label: labels.count(label) for label in set(labels)}
    assert all(f"{count} {label}" in solved.describe() for label, count in solved.counts.items())


def test_the_front_grows_in_size_and_quality() -> None:
    points = front(SENSITIVITY, COSTS)
    assert points[0].counts == {"w4a16-g64": 6}
    assert points[-1].counts == {"keep": 6}
    assert [point.bytes for point in points] == sorted(point.bytes for point in points)
    assert [point.db for point in points] == sorted(point.db for point in points)


def test_a_budget_out_of_reach_says_the_smallest_possible() -> None:
    with pytest.raises(SpecError) as caught:
        solve(SENSITIVITY, Goal(bytes=5000), COSTS)
    least = min(size for size, _ in all_policies())
    assert f"the smallest possible is 0.143x ({least} bytes)." in str(caught.value)
    assert str(caught.value).startswith("--budget 0.051x can't be met")


def test_a_quality_out_of_reach_says_the_best_possible() -> None:
    lossy = SENSITIVITY.model_copy(update={"layers": {"a": losses(1e-4)}})
    assert solve(lossy, Goal(db=90), COSTS).counts == {"keep": 1}
    with pytest.raises(SpecError, match=r"--min-quality 201 can't be met: the best possible is"):
        solve(lossy, Goal(db=201), COSTS)


def test_a_sensitivity_file_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(SENSITIVITY.model_dump_json())
    assert load_sensitivity(path) == SENSITIVITY
    assert [name for name, _ in SENSITIVITY.most_sensitive(2)] == ["b", "d"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("{}", "wrong at model_digest"),
        ('{"schema_version": 1, "layers": 3}', "wrong at"),
    ],
)
def test_what_is_no_sensitivity_file_names_the_command_that_writes_one(
    tmp_path: Path, text: str | None, words: str
) -> None:
    path = tmp_path / "s.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_sensitivity(path)
    assert words in str(caught.value)
    assert "write one with `kiln analyze MODEL -o sensitivity.json`" in str(caught.value)
