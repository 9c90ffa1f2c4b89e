"""An engine: a live callable with a signature. Feeds are checked here, once, for all backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from mmap import mmap
from types import TracebackType
from typing import Any, ClassVar, Self, final

import numpy as np

from profiles.errors import BundleError, DeviceMismatch, OutOfMemory
from runners.signature import Signature

__all__ = ["Array", "Buffer", "DeviceEngine", "Engine", "Properties"]

Array = np.ndarray[Any, Any]
Buffer = bytes | bytearray | mmap
Properties = Mapping[str, str | int | float | bool]


class Engine(ABC):
    """Runs one component from verified bytes: `with Engine(...) as engine: engine(feeds)`.

    There is no path parameter: `files` maps a file's role in this backend to the very bytes that
    were hashed. `properties` are the runtime settings that affect numerics; each is set at open
    and read back, and a difference is a BundleError.
    """

    compiles_shapes: ClassVar[bool] = False
    """Whether each shape is compiled anew, and takes memory of its own."""

    exhausted: ClassVar[tuple[str, ...]] = ()
    """What the library says, in lower case, where it gets no memory."""

    def __init__(
        self,
        files: Mapping[str, Buffer],
        *,
        signature: Signature,
        properties: Properties,
        threads: int,
    ) -> None:
        """Keep what opening needs; nothing is loaded yet."""
        self.files, self.signature, self.threads = files, signature, threads
        self.properties = dict(properties)
        self._opened = False
        self._held: Mapping[str, Any] = {}
        self._given = signature
        """What a call is given: all inputs but those that are held."""

    @classmethod
    def usable_here(cls, properties: Properties) -> bool:  # noqa: ARG003
        """Whether this machine has what engines of these properties run on."""
        return True

    @classmethod
    def require_here(cls, properties: Properties) -> None:
        """Raise DeviceMismatch, naming what is needed and what is here, unless `usable_here`."""
        if not cls.usable_here(properties):
            raise DeviceMismatch("The engine was built for another machine: compile it again here.")

    def machine(self) -> str:
        """What the open engine runs on, in words that stay the same."""
        return "this processor"

    @final
    def __enter__(self) -> Self:
        """Load the engine; OutOfMemory where there isn't enough for it."""
        with self._told():
            self._open()
        self._opened = True
        return self

    @final
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the engine."""
        self.close()

    @final
    def close(self) -> None:
        """Release the engine; calling it twice is fine."""
        if self._opened:
            self._opened = False
            self._close()

    @property
    def held(self) -> Mapping[str, Any]:
        """The very mapping that `hold` was given last."""
        return self._held

    @final
    def hold(self, feeds: Mapping[str, Any]) -> None:
        """Take these inputs in every call from now on, which is given the others alone.

        They are checked, and made ready, once; until others are held they must not change, and the
        arrays (of a DeviceEngine: the card's tensors) are contiguous. Raises as calling does.
        """
        self._require_open()
        held, given = self.signature.split(feeds)
        held.check(feeds)
        with self._told():
            self._hold(feeds)
        self._held, self._given = feeds, given

    @final
    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run on `feeds`; the outputs are the caller's to keep.

        Raises SpecError where an array's name, dtype or shape isn't the signature's, OutOfMemory
        where there isn't enough for this shape.
        """
        self._require_open()
        self._given.check(feeds)
        given = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        with self._told():
            return self._run({**given, **self._held})

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever a library raises where it gets no memory, as OutOfMemory."""
        try:
            yield
        except OutOfMemory:
            raise
        except Exception as error:
            said = f"{error} {error.__cause__ or ''}".lower()
            if not isinstance(error, MemoryError) and not any(w in said for w in self.exhausted):
                raise
            raise OutOfMemory(
                "An engine got no memory: close other programs, or take a smaller size or batch."
            ) from error

    @staticmethod
    def _same(name: str, wanted: object, got: object) -> None:
        """Raise BundleError where a property read back differs from the one set."""
        if str(wanted).lower() != str(got).lower():
            raise BundleError(
                f"The engine property {name} must be {wanted} and is {got} after opening: this "
                "library version would give other numbers; install the versions that "
                "`kiln inspect` lists, or compile again."
            )

    def _require_open(self) -> None:
        if not self._opened:
            raise RuntimeError("the engine is not open: use it as a context manager")

    @abstractmethod
    def _open(self) -> None: ...

    def _hold(self, feeds: Mapping[str, Any]) -> None:  # noqa: B027 (few have anything to do)
        """Get ready for inputs that stay."""

    @abstractmethod
    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]: ...

    @abstractmethod
    def _close(self) -> None: ...


class DeviceEngine(Engine):
    """An engine whose inputs and outputs live on a card, as torch tensors."""

    @final
    def on_device(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """As calling it, with torch tensors on the card in the place of arrays."""
        self._require_open()
        self._given.check(feeds)
        given = {name: tensor.contiguous() for name, tensor in feeds.items()}
        with self._told():
            return self._run_tensors({**given, **self._held})

    @final
    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        import torch

        given = {
            name: one if name in self._held else torch.from_numpy(one).cuda()
            for name, one in feeds.items()
        }
        return {name: tensor.cpu().numpy() for name, tensor in self._run_tensors(given).items()}

    @abstractmethod
    def _run_tensors(self, feeds: Mapping[str, Any]) -> dict[str, Any]: ...
