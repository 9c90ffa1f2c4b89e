"""A hub on 127.0.0.1 that speaks what huggingface_hub asks for one model's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

__all__ = ["COMMIT", "MODEL", "serve_model"]

MODEL = "owner/tiny"
GATED = "owner/gated"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    downloads: list[str]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        if GATED in path:
            self.refuse("GatedRepo", 403)
        elif MODEL not in path:
            self.refuse("RepoNotFound", 404)
        elif (
            path.startswith("/api/")
            and "main" not in path
            and COMMIT not in path
            and ("/revision/" in path)
        ):
            self.refuse("RevisionNotFound", 404)
        elif path.startswith(f"/api/models/{MODEL}/tree/"):
            self.send_json(self.entries())
        elif path.startswith("/api/"):
            siblings = [{"rfilename": entry["path"]} for entry in self.entries()]
            self.send_json({"id": MODEL, "sha": COMMIT, "siblings": siblings})
        else:
            self.send_file(path.split("/resolve/")[1].partition("/")[2])

    def entries(self) -> list[dict[str, Any]]:
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        return [
            {
                "type": "file",
                "path": path.relative_to(self.folder).as_posix(),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in files
        ]

    def send_file(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file():
            self.refuse("EntryNotFound", 404)
            return
        content = path.read_bytes()
        if self.command == "GET":
            self.downloads.append(name)
        self.reply(200, content, etag=f'"{hashlib.sha1(content).hexdigest()}"')

    def send_json(self, document: object) -> None:
        self.reply(200, json.dumps(document).encode())

    def refuse(self, code: str, status: int) -> None:
        self.reply(status, b"{}", error=code)

    def reply(self, status: int, content: bytes, *, etag: str = "", error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        if etag:
            self.send_header("ETag", etag)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        del format, args


@contextmanager
def serve_model(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as `MODEL`: the endpoint, and the files downloaded so far."""
    downloads: list[str] = []
    handler = type("Handler", (_Handler,), {"folder": folder, "downloads": downloads})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloads
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
