"""Which of a bundle's engines are open: all that were asked for, or one stage's at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from profiles.errors import KilnError
from runners import gauge
from runners.part_names import PARTS

if TYPE_CHECKING:
    from runners.engines.base import Engine
    from runners.manifest import ComponentEntry
    from runners.memory import Residency

__all__ = ["OpenEngines"]

_TOGETHER = {"controlnet": "denoiser"}
"""Role -> that of the engine which it takes turns with at each step."""


class OpenEngines:
    """Opens engines when they are first asked for, and lets go of them as the residency says."""

    def __init__(
        self,
        made: Callable[[ComponentEntry, str], Engine],
        *,
        residency: Residency,
        checked: Callable[[ComponentEntry, Engine], None],
        released: Callable[[], None],
    ) -> None:
        """Take what makes an engine that isn't open yet, what looks at an open one before it is
        used, and what else goes when engines do.
        """
        self.residency: Residency = residency
        self._made, self._checked, self._released = made, checked, released
        self._engines: dict[tuple[str, str], Engine] = {}
        self._stack = ExitStack()
        self._stage = ""

    def open(self, entry: ComponentEntry, form: str = "") -> Engine:
        """The component's engine, or that of a form of it; one at a time, those of other stages are
        closed first, and other forms of the same component that hold the same weights.

        Nothing stays open where that fails.
        """
        key = (entry.name, form)
        for other in [other for other in self._engines if _excludes(other, key)]:
            self._engines.pop(other).close()
        if key in self._engines:
            return self._engines[key]
        stage = _stage(entry)
        if self.residency == "sequential" and stage != self._stage:
            self.close()
        self._stage = stage
        try:
            self._engines[key] = self._stack.enter_context(self._made(entry, form))
            self._checked(entry, self._engines[key])
        except KilnError:
            self.close()
            raise
        return self._engines[key]

    def close(self) -> None:
        """Close all engines; their memory goes back to the system."""
        self._engines.clear()
        self._stack.close()
        self._released()
        gauge.trim()


def _excludes(opened: tuple[str, str], wanted: tuple[str, str]) -> bool:
    """Whether both are forms of one component that hold the same weights."""
    both_parts = opened[1] in PARTS and wanted[1] in PARTS
    return opened[0] == wanted[0] and opened[1] != wanted[1] and not both_parts


def _stage(entry: ComponentEntry) -> str:
    """Engines of the same stage run in turn, and stay open together."""
    role = _TOGETHER.get(entry.role, entry.role)
    return entry.name if role == "text_encoder" else role
