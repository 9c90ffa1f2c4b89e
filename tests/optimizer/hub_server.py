"""A hub on 127.0.0.1 that speaks what huggingface_hub asks for one model's folder."""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

__all__ = ["COMMIT", "GATED", "MODEL", "TOKEN", "Served", "serve_model"]

MODEL = "owner/tiny"
GATED = "owner/gated"
TOKEN = "hf_of_the_tests"
"""Opens GATED, which is the same model."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Served:
    """What the hub is told to do, and what it was asked for."""

    folder: Path
    endpoint: str = ""
    commit: str = COMMIT
    """Of the branch main."""
    card: dict[str, Any] = field(default_factory=lambda: {"license": "creativeml-openrail-m"})
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """File -> bytes after which its next answers break off, one number each."""
    downloads: list[str] = field(default_factory=list)
    """Files that were asked for, in order."""
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes of each file that left, all answers together."""

    def entries(self) -> list[dict[str, Any]]:
        """The files as the hub's tree lists them; safetensors are LFS files."""
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        return [self._entry(path) for path in files]

    def _entry(self, path: Path) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "type": "file",
            "path": path.relative_to(self.folder).as_posix(),
            "size": path.stat().st_size,
            "oid": etag_of(path, "sha1"),
        }
        if path.suffix == ".safetensors":
            oid = etag_of(path, "sha256")
            entry["lfs"] = {"oid": oid, "sha256": oid, "size": entry["size"], "pointerSize": 134}
        return entry


def etag_of(path: Path, kind: str) -> str:
    return _digest(path, kind, path.stat().st_mtime_ns)


@cache
def _digest(path: Path, kind: str, changed: int) -> str:
    del changed
    return hashlib.new(kind, path.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    served: Served

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        if GATED in path:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.refuse("GatedRepo", 403)
                return
            path = path.replace(GATED, MODEL)
        if MODEL not in path:
            self.refuse("RepoNotFound", 404)
        elif (
            path.startswith("/api/")
            and "main" not in path
            and self.served.commit not in path
            and ("/revision/" in path)
        ):
            self.refuse("RevisionNotFound", 404)
        elif path.startswith(f"/api/models/{MODEL}/tree/"):
            self.send_json(self.served.entries())
        elif path.startswith("/api/"):
            self.send_model()
        else:
            self.send_file(path.split("/resolve/")[1].partition("/")[2])

    def send_model(self) -> None:
        siblings = [
            {
                "rfilename": entry["path"],
                "size": entry["size"],
                "blobId": entry["oid"],
                "lfs": entry.get("lfs"),
            }
            for entry in self.served.entries()
        ]
        document = {
            "id": MODEL,
            "sha": self.served.commit,
            "siblings": siblings,
            "cardData": self.served.card,
        }
        self.send_json(document)

    def send_file(self, name: str) -> None:
        path = self.served.folder / name
        if not path.is_file():
            self.refuse("EntryNotFound", 404)
            return
        if self.command == "GET":
            self.served.downloads.append(name)
        content, status, extra = path.read_bytes(), 200, {}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted:
            start, whole = int(wanted[1]), len(content)
            content, status = content[start:], 206
            extra["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        kind = "sha256" if path.suffix == ".safetensors" else "sha1"
        self.reply(status, content, name=name, etag=f'"{etag_of(path, kind)}"', extra=extra)

    def send_json(self, document: object) -> None:
        self.reply(200, json.dumps(document).encode())

    def refuse(self, code: str, status: int) -> None:
        self.reply(status, b"{}", extra={"X-Error-Code": code})

    def reply(
        self,
        status: int,
        content: bytes,
        *,
        name: str = "",
        etag: str = "",
        extra: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", self.served.commit)
        if etag:
            self.send_header("ETag", etag)
        for header, value in (extra or {}).items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.send_content(content, name)

    def send_content(self, content: bytes, name: str) -> None:
        cuts = self.served.cuts.get(name)
        part = content[: cuts.pop(0)] if cuts else content
        self.wfile.write(part)
        self.served.sent[name] = self.served.sent.get(name, 0) + len(part)
        if len(part) < len(content):
            self.wfile.flush()
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        del format, args


@contextmanager
def serve_model(folder: Path) -> Iterator[Served]:
    """Serve a folder as `MODEL`, and as `GATED` to those who have `TOKEN`."""
    served = Served(folder)
    handler = type("Handler", (_Handler,), {"served": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    served.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
