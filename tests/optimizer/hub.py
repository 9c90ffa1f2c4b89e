"""A served model, and processes that see only it: the hub library reads its environment once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.optimizer.hub_server import MODEL, Served
from tests.tracked import ROOT

__all__ = ["Hub"]

_RESOLVE = """
import sys
from optimizer.source import resolve
from profiles.errors import KilnError
try:
    source = resolve(sys.argv[1], revision=sys.argv[2] or None)
except KilnError as error:
    print(error)
    sys.exit(error.exit_code)
print(source.kind, source.revision, source.folder.name, len(source.files))
"""

_KILN = """
import os, sys, types
from profiles import hardware
from runners.cli import main
from runners.console import quiet_libraries
quiet_libraries()  # as every command does, before the hub library is imported
from huggingface_hub import file_download
file_download.time = types.SimpleNamespace(sleep=lambda seconds: None)
if free := os.environ.get("TEST_FREE"):
    hardware.free_disk_bytes = lambda path: int(free)
main(sys.argv[1:])
"""


class Hub:
    """A served model and a cache of its own."""

    def __init__(self, served: Served, cache: Path) -> None:
        self.served, self.cache = served, cache
        self.folder, self.downloads = served.folder, served.downloads

    def resolve(
        self, model: str = MODEL, revision: str = "", **environment: str
    ) -> tuple[int, str]:
        """Exit code and what `resolve` found, or the error's sentence."""
        child = self._python(_RESOLVE, (model, revision), environment)
        assert child.stdout, child.stderr
        return child.returncode, child.stdout.strip()

    def kiln(self, *arguments: str, free: str = "", **environment: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command; with so many bytes free on every disk.

        The hub library doesn't wait before it tries again.
        """
        child = self._python(_KILN, arguments, {"TEST_FREE": free, **environment})
        assert "Traceback" not in child.stderr, child.stderr
        return child.returncode, child.stdout, child.stderr

    def _python(self, code: str, arguments: tuple[str, ...], environment: dict[str, str]) -> Any:
        base = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={
                **base,
                "HF_HOME": str(self.cache),
                "HF_ENDPOINT": self.served.endpoint,
                "KILN_CACHE": str(self.cache / "kiln"),
                **environment,
            },
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
