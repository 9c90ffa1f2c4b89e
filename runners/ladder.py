"""Ways to draw with less memory, taken in turn when it runs out after all; each is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from profiles.errors import OutOfMemory
from runners.memory import Way

__all__ = ["Ladder", "Say"]

Say = Callable[[str], None]
_T = TypeVar("_T")


class Ladder:
    """The way that a pipeline draws in, and the ways that are left, each smaller than the last."""

    def __init__(self, ways: Sequence[Way]) -> None:
        """Take at least one way, the first to be taken first."""
        self.way, *self._left = ways

    @classmethod
    def of(cls, pipeline: Any, batch: int) -> Ladder:
        """No other way than the one that the pipeline is set to."""
        loaded, tiled = pipeline.kiln, pipeline.vae.use_tiling
        return cls((Way(loaded.variant, loaded.residency, tiled, batch),))

    def set(self, pipeline: Any) -> None:
        """Have the pipeline draw in this way; engines that are open are closed."""
        pipeline.kiln.use(variant=self.way.variant, residency=self.way.residency)
        if self.way.tiled:
            pipeline.vae.enable_tiling()
        else:
            pipeline.vae.disable_tiling()

    def run(self, pipeline: Any, work: Callable[[], _T], say: Say | None) -> _T:
        """What `work` gives; where memory runs out, it is begun again in the next way.

        Raises OutOfMemory where there is no way left.
        """
        while True:
            try:
                return work()
            except (MemoryError, OutOfMemory) as error:
                reason = str(error).strip() or "The system gave no more."
            self._step(pipeline, reason, say)  # here, where the error holds no arrays any more

    def _step(self, pipeline: Any, reason: str, say: Say | None) -> None:
        pipeline.kiln.close()
        if not self._left:
            raise OutOfMemory(
                f"Memory ran out ({self.way.describe()}), and the bundle has no smaller way that "
                f"may be taken: {reason} Pictures that were finished are kept. Close other "
                "programs, take a smaller --size, or compile with a smaller level (--quant "
                "int8,int4) and add --allow-variant-fallback."
            )
        before, self.way = self.way, self._left.pop(0)
        self.set(pipeline)
        if say is not None:
            say(
                f"Warning: memory ran out ({before.describe()}); goes on with "
                f"{self.way.describe()}."
            )
