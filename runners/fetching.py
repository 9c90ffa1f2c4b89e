"""Where a packed bundle is read from: a folder or a web server, in chunks, never beyond a size."""

from __future__ import annotations

import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, final

from profiles.errors import BundleError, PartialError, SpecError
from runners.files import opened, read_optional

__all__ = ["CHUNK", "Chunk", "FolderPlace", "Place", "PlacedFile", "WebPlace", "place_of"]

CHUNK = 1 << 16
"""Bytes at a time: still in the processor's cache when they are written after being hashed. Linux 6
took twice as long for writes of 1 MiB where memory was nearly full."""

Chunk = bytes | memoryview
_TRIES = 5
"""How often in a row an answer may break off without giving a byte."""
_TIMEOUT_S = 30.0


class Place(ABC):
    """Files by name, whose bytes nobody has verified yet."""

    text: str
    """How messages call it."""

    @abstractmethod
    def small(self, name: str, limit: int) -> bytes:
        """The whole of a small file; BundleError where it is larger than `limit` bytes."""

    @abstractmethod
    def stream(self, name: str, start: int, size: int) -> Iterator[Chunk]:
        """Bytes from `start` on of a file that must have `size` bytes; BundleError if it hasn't.

        A chunk is only good until the next one is asked for: the same memory may hold that.
        """

    def descriptor(self, name: str) -> AbstractContextManager[int | None]:  # noqa: ARG002
        """The open file, where it is one of this machine's; else None."""
        return nullcontext()


@dataclass(frozen=True)
class PlacedFile:
    """One file of a place, as runners.writing reads it."""

    place: Place
    name: str
    size: int
    advance: Callable[[int], None] = lambda _: None
    """Told how many bytes were read."""

    def stream(self, start: int) -> Iterator[Chunk]:
        """The bytes from `start` on."""
        for chunk in self.place.stream(self.name, start, self.size):
            self.advance(len(chunk))
            yield chunk

    @contextmanager
    def descriptor(self) -> Iterator[int | None]:
        """The open file, where it is one of this machine's and has the right size."""
        with self.place.descriptor(self.name) as file:
            right = file is not None and os.fstat(file).st_size == self.size
            yield file if right else None


@final
class FolderPlace(Place):
    """A folder on a disk or a mounted share; no link below it is followed."""

    def __init__(self, root: Path) -> None:
        """Take a folder that is there."""
        self.root, self.text = root, str(root)

    def small(self, name: str, limit: int) -> bytes:
        """Read it, if it is a plain file and small."""
        raw = read_optional(self.root, name, limit=limit)
        if raw is None:
            raise BundleError(f"{self.root} has no {name}, which it lists: copy or pack it again.")
        return raw

    def stream(self, name: str, start: int, size: int) -> Iterator[Chunk]:
        """Read a plain file of this very size."""
        with opened(self.root, name) as file:
            if (found := os.fstat(file).st_size) != size:
                raise _other_size(name, self.text, found, size)
            os.lseek(file, start, os.SEEK_SET)
            left, buffer = size - start, memoryview(bytearray(CHUNK))
            with FileIO(file, closefd=False) as plain:
                while left and (got := plain.readinto(buffer[: min(CHUNK, left)])):
                    left -= got
                    yield buffer[:got]

    @contextmanager
    def descriptor(self, name: str) -> Iterator[int | None]:
        """The open file, if it is a plain one."""
        with opened(self.root, name) as file:
            own = os.dup(file)  # what fails while it is used isn't a failure to read it
        try:
            yield own
        finally:
            os.close(own)


@final
class WebPlace(Place):
    """A folder of a web server; what breaks off is taken up where it stopped."""

    def __init__(self, url: str) -> None:
        """Take an http or https address; nothing is asked yet."""
        parts = urllib.parse.urlsplit(url)
        if not parts.hostname or parts.query or parts.fragment or parts.username:
            raise SpecError(
                f"{url} can't be installed from: give http(s)://server/path of a packed folder, "
                "without user, query or fragment."
            )
        self._url = self.text = url.rstrip("/")
        self._opener = urllib.request.OpenerDirector()
        for handler in (  # neither file: nor ftp:, whatever a server redirects to
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
        ):
            self._opener.add_handler(handler)

    def small(self, name: str, limit: int) -> bytes:
        """Fetch it whole, asking again where the answer breaks off."""
        for last in range(1, _TRIES + 1):
            try:
                with self._ask(name, 0) as answer:
                    raw = bytes(answer.read(limit + 1))
                    if len(raw) > limit:
                        raise _too_large(name, self.text, limit)
                    if answer.length in (None, 0):
                        return raw
            except (OSError, http.client.HTTPException) as error:
                if last == _TRIES:
                    raise self._unreachable(error) from error
            _wait(last)
        raise self._unreachable("the answer breaks off")

    def stream(self, name: str, start: int, size: int) -> Iterator[Chunk]:
        """Fetch in chunks; after a cut, the rest is asked for."""
        at, failures = start, 0
        while at < size:
            try:
                for chunk in self._once(name, at, size):
                    at += len(chunk)
                    failures = 0
                    yield chunk
                cause: object = "the answer breaks off"
            except (OSError, http.client.HTTPException) as error:
                cause = error
            failures += 1
            if at < size and failures == _TRIES:
                raise self._unreachable(cause)
            if at < size:
                _wait(failures)

    def _once(self, name: str, at: int, size: int) -> Iterator[Chunk]:
        """What one answer gives from `at` on: the rest, or less where it breaks off."""
        with self._ask(name, at) as answer:
            begins, whole = _extent(answer)
            if whole not in (None, size):
                raise _other_size(name, self.text, whole, size)
            if begins > at:
                raise BundleError(f"{self.text} answers with another part of {name}: refused.")
            while begins < size and (chunk := answer.read(min(CHUNK, size - begins))):
                begins += len(chunk)
                if begins > at:  # a server without ranges begins at 0
                    yield chunk[-(begins - at) :]
                    at = begins

    def _ask(self, name: str, start: int) -> Any:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        request = urllib.request.Request(f"{self._url}/{name}", headers=headers)
        try:
            return self._opener.open(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:
                raise BundleError(f"{name} at {self.text} is shorter than it should be.") from error
            if error.code >= 500:
                raise ConnectionError(f"HTTP {error.code}") from error
            raise SpecError(
                f"{self.text} has no {name} (HTTP {error.code}): give the address of a folder "
                "that `kiln pack` wrote."
            ) from error

    def _unreachable(self, cause: object) -> PartialError:
        reason = getattr(cause, "reason", cause)
        return PartialError(
            f"{self.text} can't be read ({reason}): run it again when the server answers; what "
            "was fetched is kept."
        )


def place_of(source: str) -> Place:
    """The place that a user's SRC names; SpecError where there is none."""
    if re.match(r"https?://", source, re.IGNORECASE):
        return WebPlace(source)
    if not Path(source).is_dir():
        raise SpecError(
            f"{source} is not a folder: give one that `kiln pack` wrote, a bundle, or "
            "http(s)://server/path."
        )
    return FolderPlace(Path(source))


def _extent(answer: Any) -> tuple[int, int | None]:
    """Where an answer begins and how long the whole file is, by its headers."""
    if answer.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if found is None:
            raise ConnectionError("a part without its place")
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = answer.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _wait(failures: int) -> None:
    time.sleep(min(0.1 * 2**failures, 5.0))


def _too_large(name: str, text: str, limit: int) -> BundleError:
    return BundleError(f"{name} of {text} has more than {limit} bytes: refused.")


def _other_size(name: str, text: str, found: int | None, size: int) -> BundleError:
    return BundleError(
        f"{name} of {text} has {found} bytes where {size} are listed: it is damaged; pack it again."
    )
