"""The signature of an engine: which arrays it takes and gives, over which ranges.

Ranges are data in the manifest, so a size that no engine was compiled for is refused before
anything runs, with the nearest legal one in the message.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from profiles.errors import SpecError

__all__ = ["Dim", "Signature", "TensorSpec"]

_STRICT = ConfigDict(frozen=True, extra="forbid")


class Dim(BaseModel):
    """A named axis that may vary: `min <= value <= max` in steps of `multiple_of`."""

    model_config = _STRICT

    name: str
    min: int
    opt: int
    """The value that matters most; engines that tune for one shape tune for this."""
    max: int
    multiple_of: int = 1
    of: str | None = None
    """A dim that this one follows from: it is the `per`-th part of that, rounded up."""
    per: int = 1
    free: bool = False
    """Whether each array has a value of its own, which may be 0: the ranks of low-rank inputs."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        least = 0 if self.free else 1
        if not least <= self.min <= self.opt <= self.max:
            raise ValueError(f"dim {self.name}: needs {least} <= min <= opt <= max")
        if self.multiple_of < 1 or self.max // self.multiple_of * self.multiple_of < self.min:
            raise ValueError(f"dim {self.name}: no value from min to max is legal")
        return self

    def legal(self, value: int) -> bool:
        """Whether an engine with this dim takes `value`."""
        return self.min <= value <= self.max and value % self.multiple_of == 0

    def nearest(self, value: int) -> int:
        """The legal value closest to `value` (the larger one of two)."""
        step = self.multiple_of
        low, high = -(-self.min // step) * step, self.max // step * step
        rounded = (value + step // 2) // step * step
        return max(low, min(high, rounded))

    def following(self, values: Mapping[str, int]) -> int:
        """The value that follows from those of other dims; its own where it follows from none."""
        return values[self.name] if self.of is None else -(-values[self.of] // self.per)

    @property
    def fixed(self) -> bool:
        """Whether there is only one legal value."""
        return self.min == self.max

    def describe(self) -> str:
        """The range as a reader expects it."""
        if self.fixed:
            return f"{self.min}"
        step = f" in steps of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"{self.min} to {self.max}{step}"


class TensorSpec(BaseModel):
    """One array: its name, its dtype in numpy's words, and its axes (a size or a dim's name)."""

    model_config = _STRICT

    name: str
    dtype: str
    axes: tuple[int | str, ...]

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if impossible := [axis for axis in self.axes if isinstance(axis, int) and axis < 1]:
            raise ValueError(f"{self.name}: an axis can't be {impossible[0]} long")
        return self


class Signature(BaseModel):
    """What an engine takes and gives, and the ranges of the dims that its axes name."""

    model_config = _STRICT

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: tuple[Dim, ...] = ()

    def dim(self, name: str) -> Dim:
        """The dim called `name`; KeyError where the signature has none."""
        return {dim.name: dim for dim in self.dims}[name]

    @property
    def free(self) -> frozenset[str]:
        """The dims of which each array has a value of its own."""
        return frozenset(dim.name for dim in self.dims if dim.free)

    def split(self, names: Collection[str]) -> tuple[Signature, Signature]:
        """With the inputs of these names alone, and with the others alone."""
        inside = tuple(spec for spec in self.inputs if spec.name in names)
        outside = tuple(spec for spec in self.inputs if spec.name not in names)
        return self.model_copy(update={"inputs": inside}), self.model_copy(
            update={"inputs": outside}
        )

    def check(self, feeds: Mapping[str, Any]) -> dict[str, int]:
        """Compare arrays with the signature and return the value of every dim of theirs.

        Raises SpecError that names the array, the value seen and the legal values.
        """
        expected = [spec.name for spec in self.inputs]
        if set(feeds) != set(expected):
            raise SpecError(f"The engine takes the inputs {expected}, and got {sorted(feeds)}.")
        values: dict[str, int] = {}
        dims = {dim.name: dim for dim in self.dims}
        for spec in self.inputs:
            _check_one(spec, feeds[spec.name], values, dims)
        for dim in self.dims:
            if dim.of is None or dim.name not in values:
                continue
            if values[dim.name] != dim.following(values):
                raise SpecError(
                    f"The engine's {dim.name} is {values[dim.name]}, and {dim.following(values)} "
                    f"follows from {dim.of} {values[dim.of]}."
                )
        return values


@cache
def _name(dtype: Any) -> str:
    """As specs have it; numpy takes microseconds to find it, for each of a LoRA's hundreds."""
    return str(dtype).removeprefix("torch.")


def _check_one(
    spec: TensorSpec, array: Any, values: dict[str, int], dims: Mapping[str, Dim]
) -> None:
    dtype = _name(array.dtype)
    if dtype != spec.dtype:
        raise SpecError(f"Input {spec.name} must be {spec.dtype}, and is {dtype}.")
    if len(array.shape) != len(spec.axes):
        raise SpecError(
            f"Input {spec.name} has {len(array.shape)} axes, and the engine takes "
            f"{len(spec.axes)}: {list(spec.axes)}."
        )
    for axis, size in zip(spec.axes, array.shape, strict=True):
        if isinstance(axis, int):
            if size != axis:
                raise SpecError(f"Input {spec.name} needs {axis} where it has {size}.")
            continue
        dim = dims[axis]
        if not dim.free and values.setdefault(axis, size) != size:
            raise SpecError(f"Input {spec.name} has {axis} {size}; others have {values[axis]}.")
        if not dim.legal(size):
            raise SpecError(
                f"Input {spec.name} has {axis} {size}, and the engine was compiled for "
                f"{dim.describe()}: use {dim.nearest(size)}, or compile with a wider range."
            )
