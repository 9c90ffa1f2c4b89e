"""Coefficients from measured shapes: exact where they can be, never too low where they can't."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from optimizer.backends import Built
from optimizer.footprint import Seen, fitted, measured, sizes_at
from optimizer.memory_entries import part_memory, per_pixel, places_per_pixel
from runners import gauge
from runners.files import MAPPED_FROM
from runners.memory import Shape
from runners.signature import Dim, Signature, TensorSpec

MIB = 1 << 20
SHAPES = [Shape(1, 64, 0), Shape(1, 256, 0), Shape(2, 1024, 0), Shape(1, 4096, 0)]


def seen(formula: dict[str, float], extra: float = 0.0) -> list[Seen]:
    return [
        Seen(
            shape,
            shape.bytes(formula),
            shape.bytes({**formula, "constant": extra + formula["constant"]}),
        )  # type: ignore[arg-type,dict-item]
        for shape in SHAPES
    ]


def test_what_grows_with_pixels_is_found() -> None:
    part = fitted(seen({"constant": 100 * MIB, "pixels": 9000.0}, extra=5 * MIB))
    assert part.resident_bytes == pytest.approx(100 * MIB, abs=10)
    assert part.stays["pixels"] == pytest.approx(9000, rel=1e-6)
    assert part.peak_bytes(Shape(4, 4096, 0)) == pytest.approx(
        105 * MIB + 9000 * 4 * 4096, rel=1e-6
    )


def test_a_held_attention_matrix_is_found_and_extrapolated() -> None:
    part = fitted(seen({"constant": 10 * MIB, "pixels": 1000.0, "pixels_squared": 8.0}))
    large = Shape(1, 16384, 0)
    assert part.open_bytes(large) == pytest.approx(10 * MIB + 1000 * 16384 + 8 * 16384**2, rel=0.01)


def test_noise_is_no_attention_matrix() -> None:
    noisy = [
        Seen(shape, value := round(50 * MIB + 8000 * shape.feature("pixels") + k % 2 * MIB), value)
        for k, shape in enumerate(SHAPES)
    ]
    assert "pixels_squared" not in fitted(noisy).stays


def test_no_measured_shape_is_predicted_too_low() -> None:
    rough = [
        Seen(shape, value, value + MIB)
        for shape, value in zip(SHAPES, (80 * MIB, 95 * MIB, 90 * MIB, 140 * MIB), strict=True)
    ]
    part = fitted(rough)
    for one in rough:
        assert part.open_bytes(one.shape) >= one.stays - 1
        assert part.peak_bytes(one.shape) >= one.peak - 1


def test_a_text_encoder_of_one_shape_is_a_constant() -> None:
    part = fitted([Seen(Shape(1, 0, 0), 12 * MIB, 13 * MIB)])
    assert (part.resident_bytes, part.stays) == (12 * MIB, {})
    assert part.peak_bytes(Shape(1, 512**2, 77)) == 13 * MIB


@pytest.mark.parametrize(
    ("least", "native", "beyond", "sides"),
    [
        (32, 64, True, [32, 64, 128, 256]),
        (32, 64, False, [32, 64]),
        (64, 64, False, [64, 96]),
    ],
)
def test_slow_parts_are_measured_up_to_the_native_side(
    least: int, native: int, beyond: bool, sides: list[int]
) -> None:
    dims = (
        Dim(name="batch", min=1, opt=1, max=1),
        *(Dim(name=n, min=least, opt=native, max=256, multiple_of=8) for n in ("height", "width")),
    )
    signature = Signature(inputs=(), outputs=(), dims=dims)
    wanted = [(1, 1), (2, 1), (4, 2), (8, 1), (8, 2)]
    found = sizes_at(signature, wanted, beyond_native=beyond)
    assert [sizes["height"] for sizes in found] == sides
    assert all(sizes["width"] == sizes["height"] for sizes in found)


def test_places_become_pixels_of_the_picture() -> None:
    signature = Signature(
        inputs=(),
        outputs=(),
        dims=(Dim(name="height", min=8, opt=8, max=64), Dim(name="width", min=8, opt=8, max=64)),
    )
    assert places_per_pixel(signature, 64) == 1 / 64
    part = fitted(seen({"constant": MIB, "pixels": 640.0}))
    assert per_pixel(part, 1 / 64).open_bytes(Shape(1, 64 * 256, 0)) == pytest.approx(
        part.open_bytes(Shape(1, 256, 0)), abs=2
    )
    patches = Signature(inputs=(), outputs=(), dims=(Dim(name="sequence", min=16, opt=16, max=64),))
    assert places_per_pixel(patches, 64) == 1 / 256


def test_small_files_are_held_and_large_ones_are_not(tmp_path: Path) -> None:

    (tmp_path / "small").write_bytes(b"x" * 1000)
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(MAPPED_FROM)
    signature = Signature(inputs=(), outputs=(), dims=())
    found = fitted([Seen(Shape(1, 0, 0), 1, 1)]).model_dump(mode="json")
    part = part_memory(found, tmp_path, signature, side_min=8)
    assert part is not None
    assert part.held_bytes == 1000


class _Reads:
    """An engine that reads its whole file, and holds 20 kB a place while it is open."""

    compiles_shapes = False

    def __init__(self, files: Any, **_given: object) -> None:
        self.files = files

    def __enter__(self) -> Self:
        self.found = sum(self.files["weights"][::4096])
        return self

    def __exit__(self, *_error: object) -> None:
        del self.held

    def __call__(self, feeds: dict[str, Any]) -> None:
        self.held = np.ones(20_000 * feeds["x"].size, np.uint8)  # with no copy that stays behind


def test_a_mapped_file_counts_at_every_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").write_bytes(b"w" * (MAPPED_FROM + MIB))
    sides = (Dim(name="height", min=8, opt=8, max=64), Dim(name="width", min=8, opt=8, max=64))
    spec = TensorSpec(name="x", dtype="float32", axes=("batch", "height", "width"))
    signature = Signature(
        inputs=(spec,), outputs=(), dims=(Dim(name="batch", min=1, opt=1, max=1), *sides)
    )
    monkeypatch.setattr("optimizer.footprint.engine_class", lambda _name: _Reads)
    shapes = [{"batch": 1, "height": side, "width": side} for side in (8, 32, 64)]
    x = np.zeros((1, 8, 8), np.float32)
    part = measured("", Built({"weights": "weights"}, {}), signature, tmp_path, [x], shapes)
    assert part.stays["pixels"] == pytest.approx(20_000, rel=0.1)
    assert part.resident_bytes == pytest.approx(MAPPED_FROM, rel=0.2)


def test_the_gauge_sees_what_is_taken_and_given_back() -> None:
    gauge.trim()
    gauge.reset_peak()
    before = gauge.resident_bytes()
    block = bytearray(b"x" * (64 * MIB))
    during = gauge.resident_bytes()
    del block
    gauge.trim()
    assert during - before > 60 * MIB
    assert gauge.peak_bytes() - before > 60 * MIB
    assert gauge.resident_bytes() - before < 30 * MIB
