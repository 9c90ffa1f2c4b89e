"""Progress of one stage: steps counted towards a total."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["Progress", "Steps"]

Progress = Callable[[float, float], None]
"""(done, total), called as work proceeds."""

T = TypeVar("T")


class Steps:
    """Counts steps and passes them on."""

    def __init__(self, progress: Progress, total: int) -> None:
        """Begin at 0 of `total`."""
        self._progress, self._total, self._done = progress, total, 0

    def advance(self, steps: int = 1) -> None:
        """Count `steps` more as done."""
        self._done += steps
        self._progress(self._done, self._total)

    def within(self, steps: int, share: float) -> None:
        """Say which share (0 to 1) of the next `steps` is done, without counting them yet."""
        self._progress(self._done + steps * share, self._total)

    def counting(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, each counted as a step when the next one is asked for."""
        for item in items:
            yield item
            self.advance()
