"""Recorded work: fixed buffers, one recording a shape, made by a card or, here, by a stand-in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runners.engines.replaying import Replaying

Work = Callable[[], list[Tensor]]


class Notes:
    """In a CUDA graph's place: replaying runs the work again into the outputs' own memory."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, work: Work) -> tuple[Callable[[], None], list[Tensor]]:
        self.recorded += 1
        outputs = work()

        def replay() -> None:
            self.replayed += 1
            for buffer, fresh in zip(outputs, work(), strict=True):
                buffer.copy_(fresh)

        return replay, outputs


def double(x: Tensor, y: Tensor) -> list[Tensor]:
    return [2 * x, x.sum() + y]


def feeds(rows: int, value: float) -> dict[str, Tensor]:
    return {"x": torch.full((rows, 3), value), "y": torch.tensor([value])}


def test_a_shape_is_recorded_once_and_replayed_on_new_values() -> None:
    notes = Notes()
    run = Replaying(double, recorder=notes.record)
    for value in (1.0, 5.0, -2.0):
        found = run(feeds(2, value))
        assert torch.equal(found[0], torch.full((2, 3), 2 * value))
        assert found[1].tolist() == [7 * value]
    assert (notes.recorded, notes.replayed) == (1, 3)


def test_outputs_are_the_callers_to_keep() -> None:
    run = Replaying(double, recorder=Notes().record)
    first = run(feeds(2, 1.0))
    run(feeds(2, 9.0))
    assert torch.equal(first[0], torch.full((2, 3), 2.0))


def test_inputs_are_copied_and_never_kept() -> None:
    run = Replaying(double, recorder=Notes().record)
    given = feeds(2, 1.0)
    run(given)
    given["x"].fill_(100)
    assert torch.equal(run(feeds(2, 3.0))[0], torch.full((2, 3), 6.0))


def test_the_shapes_used_last_are_kept() -> None:
    notes = Notes()
    run = Replaying(double, recorder=notes.record, kept=2)
    for rows in (1, 2, 1, 3, 1, 2):
        run(feeds(rows, 1.0))
    assert notes.recorded == 4  # 1, 2, 3 in the place of 2, and 2 again
    run.forget()
    run(feeds(1, 1.0))
    assert notes.recorded == 5
