"""The C++ compiler that some backends need where they build, and nobody where engines run."""

from __future__ import annotations

import os
import shutil
import sys

from profiles.errors import MissingError

__all__ = ["require_compiler"]


def require_compiler(backend: str) -> None:
    """Raise MissingError, with the package that brings it, where there is no C++ compiler."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else _USUAL.get(sys.platform, ["g++"])
    if any(shutil.which(name) for name in names):
        return
    install = _INSTALL.get(sys.platform, "install g++ (apt install g++, or dnf install gcc-c++)")
    raise MissingError(
        f"The backend {backend} compiles C++, and {' or '.join(names)} isn't there: {install}. The "
        "finished bundle needs none."
    )


_USUAL = {"win32": ["cl"], "darwin": ["clang++"]}
_INSTALL = {
    "win32": "install Microsoft's Build Tools for Visual Studio",
    "darwin": "run xcode-select --install",
}
