"""Which of a bundle's engines are open: all that were asked for, or one stage's at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from profiles.errors import KilnError
from runners import gauge

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
        self._engines: dict[str, Engine] = {}
        self._forms: dict[str, str] = {}
        self._stack = ExitStack()
        self._stage = ""

    def open(self, entry: ComponentEntry, form: str = "") -> Engine:
        """The component's engine, or that of a form of it; one at a time, those of other stages are
        closed first, and another form of the same component.

        Nothing stays open where that fails.
        """
        name = entry.name
        if name in self._engines and self._forms[name] != form:
            self._engines.pop(name).close()
            gauge.trim()
        if name in self._engines:
            return self._engines[name]
        stage = _stage(entry)
        if self.residency == "sequential" and stage != self._stage:
            self.close()
        self._stage = stage
        try:
            self._engines[name] = self._stack.enter_context(self._made(entry, form))
            self._forms[name] = form
            self._checked(entry, self._engines[name])
        except KilnError:
            self.close()
            raise
        return self._engines[name]

    def close(self) -> None:
        """Close all engines; their memory goes back to the system."""
        self._engines.clear()
        self._stack.close()
        self._released()
        gauge.trim()


def _stage(entry: ComponentEntry) -> str:
    """Engines of the same stage run in turn, and stay open together."""
    role = _TOGETHER.get(entry.role, entry.role)
    return entry.name if role == "text_encoder" else role
