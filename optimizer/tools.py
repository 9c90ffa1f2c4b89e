"""The versions of what makes an artifact, kiln's own code included; read without importing any."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from optimizer.backends import BACKENDS
from optimizer.compilers import require_compiler
from optimizer.digests import digest, sha256_file
from profiles.errors import MissingError, UnsupportedError
from runners.engines import EXTRAS

__all__ = ["EXPORT", "LIBRARIES", "TORCH", "kiln_version", "require_libraries", "versions"]

TORCH = ("torch", "diffusers", "transformers")
"""What decides the numbers of the fp32 model."""

EXPORT = (*TORCH, "onnx", "onnx-ir", "onnxscript")
"""What decides an exported graph."""


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """The installed version of each distribution, and kiln's with a digest of its code."""
    found = {name: _version(name) for name in distributions}
    return {**found, "kiln": f"{kiln_version()}+{_code_digest()[:12]}"}


def kiln_version() -> str:
    """The version of this package; "0" when run from a tree that isn't installed."""
    found = _version("kiln-diffusion")
    return found if found != "absent" else "0"


LIBRARIES = {
    "llm-int8": "bitsandbytes",
    "nf4": "bitsandbytes",
    "torchao-int8-dyn": "torchao",
}
"""Format -> the library that runs it, of whose name there is an extra."""


def require_libraries(backends: Collection[str], formats: Collection[str] = ()) -> None:
    """Raise MissingError, with the command that installs it, for what compiling lacks here, and
    UnsupportedError where a card is needed and missing.
    """
    needed = {"onnx": "compile", "onnxscript": "compile"}
    needed |= {LIBRARIES[name]: LIBRARIES[name] for name in formats if name in LIBRARIES}
    for name in backends:
        if name in EXTRAS:
            needed[BACKENDS[name].library] = EXTRAS[name]
    missing = {name: extra for name, extra in needed.items() if _is_absent(name)}
    if missing:
        extras = ",".join(sorted({*missing.values(), "compile"}))
        raise MissingError(
            f"Compiling needs {', '.join(missing)}, which isn't installed: run "
            f'pip install "kiln-diffusion[{extras}]".'
        )
    for name in backends:
        _require_card(name)
        if BACKENDS[name].compiler:
            require_compiler(name)


def _require_card(name: str) -> None:
    """Raise UnsupportedError where a backend builds on the card that it is for, and has none."""
    known = BACKENDS[name]
    if known.device == "cpu" or known.capabilities:
        return
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"The backend {name} builds on the card that it builds for, and no NVIDIA card is "
            "usable here: use --backend tensorrt-rtx with --target, which needs none."
        )


def _is_absent(distribution: str) -> bool:
    """Whether its module can't be imported; of a module that two distributions have, whether it is
    this one's.
    """
    if distribution in _SHARED:
        return _version(distribution) == "absent"
    return find_spec(distribution.replace("-", "_")) is None


_SHARED = ("onnxruntime-gpu",)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "absent"


@cache
def _code_digest() -> str:
    """Over the code that makes and reads artifacts: a changed line never reuses an old artifact."""
    root = Path(__file__).parents[1]
    files = sorted(
        path for package in ("optimizer", "runners") for path in (root / package).rglob("*.py")
    )
    return digest({path.relative_to(root).as_posix(): sha256_file(path) for path in files})
