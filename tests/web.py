"""A web server on 127.0.0.1 that gives a folder's files, and breaks off where it is told to."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

__all__ = ["Served", "serve"]


@dataclass
class Served:
    """What the server is told to do, and what it was asked for."""

    folder: Path
    url: str = ""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """File -> bytes after which its next answers break off, one number each."""
    ranges: bool = True
    """Whether parts are given when they are asked for."""
    lengths: bool = True
    """Whether answers say how long they are."""
    status: int = 0
    """What every answer fails with, if not 0."""
    redirect: str = ""
    """Where every answer leads, if anywhere."""
    asked: list[tuple[str, int]] = field(default_factory=list)
    """Files and first bytes, in order."""
    sent: int = 0
    """Bytes of all bodies."""


class _Handler(BaseHTTPRequestHandler):
    served: Served

    def do_GET(self) -> None:
        served, name = self.served, self.path.removeprefix("/packed/")
        path = served.folder / name
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(wanted[1]) if wanted and served.ranges else 0
        served.asked.append((name, start))
        if served.redirect:
            self.send_response(302)
            self.send_header("Location", served.redirect)
            self.end_headers()
        elif served.status or not path.is_file():
            self.send_error(served.status or 404)
        else:
            self.give(path.read_bytes(), start, name, part=bool(wanted) and served.ranges)

    def give(self, content: bytes, start: int, name: str, *, part: bool) -> None:
        if part and start >= len(content):
            self.send_error(416)
            return
        body = content[start:]
        self.send_response(206 if part else 200)
        if part:
            place = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send_header("Content-Range", place)
        if self.served.lengths:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cuts = self.served.cuts.get(name)
        sent = body[: cuts.pop(0)] if cuts else body
        with suppress(OSError):
            self.wfile.write(sent)
        self.served.sent += len(sent)
        self.close_connection = True
        if len(sent) < len(body):
            with suppress(OSError):
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        del format, args


@contextmanager
def serve(folder: Path) -> Iterator[Served]:
    """Serve `folder` as `url`, which ends in /packed."""
    served = Served(folder)
    handler = type("Handler", (_Handler,), {"served": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    served.url = f"http://127.0.0.1:{server.server_port}/packed"
    thread = Thread(target=lambda: server.serve_forever(0.02), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
