"""The repository as git knows it, for tests that read the repository itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["PACKAGES", "ROOT", "modules", "tracked_files"]

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("benchmarks", "optimizer", "runners", "profiles")
"""From the top downwards: each may import itself and what is right of it."""


def tracked_files() -> list[str]:
    """Paths of all tracked files, and of those that would be added, as git prints them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    names = listed.stdout.decode().split("\0")
    return sorted(name for name in names if name and (ROOT / name).is_file())


def modules() -> list[str]:
    """Paths of the packages' modules, relative to the root."""
    return [
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    ]
