from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from profiles.errors import SpecError
from runners.signature import Dim, Signature, TensorSpec

DIMS = [
    Dim(name="side", min=low, opt=low, max=high, multiple_of=step)
    for low, high, step in ((1, 1, 1), (8, 64, 8), (5, 23, 3), (3, 20, 4), (7, 7, 7), (1, 9, 2))
]


@pytest.mark.parametrize("dim", DIMS, ids=str)
def test_the_nearest_value_is_legal_and_no_legal_value_is_closer(dim: Dim) -> None:
    legal = [value for value in range(100) if dim.legal(value)]
    for value in range(-3, 100):
        nearest = dim.nearest(value)
        assert nearest in legal
        assert abs(nearest - value) == min(abs(other - value) for other in legal)


def test_of_two_equally_near_values_the_larger_is_named() -> None:
    dim = Dim(name="side", min=8, opt=8, max=64, multiple_of=8)
    assert dim.nearest(12) == 16


@pytest.mark.parametrize("dim", DIMS, ids=str)
def test_legal_values_are_their_own_nearest(dim: Dim) -> None:
    for value in range(100):
        assert dim.legal(value) == (dim.nearest(value) == value)


def test_a_range_describes_itself() -> None:
    def dim(low: int, high: int, step: int = 1) -> str:
        return Dim(name="side", min=low, opt=low, max=high, multiple_of=step).describe()

    assert dim(2, 2) == "2"
    assert dim(1, 4) == "1 to 4"
    assert dim(64, 256, 8) == "64 to 256 in steps of 8"


@pytest.mark.parametrize(("low", "opt", "high"), [(0, 1, 2), (4, 3, 8), (4, 9, 8)])
def test_a_dim_out_of_order_is_refused(low: int, opt: int, high: int) -> None:
    with pytest.raises(ValidationError, match="1 <= min <= opt <= max"):
        Dim(name="side", min=low, opt=opt, max=high)


@pytest.mark.parametrize(("low", "high", "step"), [(65, 71, 8), (1, 4, 0)])
def test_a_dim_without_a_legal_value_is_refused(low: int, high: int, step: int) -> None:
    with pytest.raises(ValidationError, match="no value from min to max is legal"):
        Dim(name="side", min=low, opt=low, max=high, multiple_of=step)


SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="sample", dtype="float32", axes=("batch", 4, "height", "width")),
        TensorSpec(name="timestep", dtype="float32", axes=("batch",)),
    ),
    outputs=(TensorSpec(name="out", dtype="float32", axes=("batch", 4, "height", "width")),),
    dims=(
        Dim(name="batch", min=1, opt=2, max=4),
        Dim(name="height", min=8, opt=16, max=32, multiple_of=2),
        Dim(name="width", min=16, opt=16, max=16),
    ),
)


def feeds(shape: tuple[int, ...] = (2, 4, 10, 16), steps: int = 2) -> dict[str, object]:
    return {
        "sample": np.zeros(shape, np.float32),
        "timestep": np.zeros(steps, np.float32),
    }


def test_right_arrays_give_the_value_of_every_dim() -> None:
    assert SIGNATURE.check(feeds()) == {"batch": 2, "height": 10, "width": 16}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"sample": feeds()["sample"]}, "takes the inputs ['sample', 'timestep'], and got"),
        ({**feeds(), "more": feeds()["sample"]}, "and got ['more', 'sample', 'timestep']"),
        (
            {**feeds(), "sample": np.zeros((2, 4, 10, 16), np.float64)},
            "sample must be float32, and is float64",
        ),
        (feeds((2, 4, 10)), "sample has 3 axes, and the engine takes 4"),
        (feeds((2, 3, 10, 16)), "sample needs 4 where it has 3"),
        (feeds(steps=3), "timestep has batch 3; others have 2"),
        (
            feeds((2, 4, 11, 16)),
            "height 11, and the engine was compiled for 8 to 32 in steps of 2: use 12",
        ),
        (feeds((2, 4, 40, 16)), "use 32, or compile with a wider range"),
        (feeds((2, 4, 10, 24)), "compiled for 16: use 16"),
        (feeds((5, 4, 10, 16), steps=5), "batch 5, and the engine was compiled for 1 to 4: use 4"),
    ],
)
def test_a_wrong_array_is_named_with_the_legal_values(
    wrong: dict[str, object], sentence: str
) -> None:
    with pytest.raises(SpecError) as caught:
        SIGNATURE.check(wrong)
    assert sentence in str(caught.value)


def test_a_signature_round_trips_through_json() -> None:
    assert Signature.model_validate_json(SIGNATURE.model_dump_json()) == SIGNATURE


def test_a_signature_with_an_unknown_field_is_refused() -> None:
    document = {**SIGNATURE.model_dump(mode="json"), "layout": "nhwc"}
    with pytest.raises(ValidationError, match="layout"):
        Signature.model_validate(document)


def test_an_unknown_dim_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="depth"):
        SIGNATURE.dim("depth")
