"""The library that each backend's engines run on: what it is called, and what installs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["BESIDE", "LIBRARIES", "Library", "version_of"]


@dataclass(frozen=True)
class Library:
    """One backend's library."""

    distributions: tuple[str, ...]
    """Names that it is distributed under, any one of which will do; the first is named by us."""
    extra: str | None
    """The extra of kiln's package that installs it; None where kiln itself needs it."""
    on_card: bool = False
    """Whether it runs on NVIDIA cards only."""

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f'pip install "kiln-diffusion{f"[{self.extra}]" if self.extra else ""}"'


LIBRARIES: dict[str, Library] = {
    "openvino": Library(("openvino",), "cpu"),
    "onnxruntime": Library(("onnxruntime", "onnxruntime-gpu"), "cpu"),
    "tensorrt-rtx": Library(("tensorrt-rtx",), "rtx", on_card=True),
    "tensorrt": Library(("tensorrt",), "tensorrt", on_card=True),
    "onnxruntime-cuda": Library(("onnxruntime-gpu",), "cuda", on_card=True),
    "aoti-cuda": Library(("torch",), None, on_card=True),
    "aoti": Library(("torch",), None),
    "aoti-blocks": Library(("torch",), None),
    "eager": Library(("torch",), None),
}
"""Backend -> its library."""

BESIDE = ("diffusers", "transformers")
"""Distributions that every bundle runs on, beside its engines' libraries."""


def version_of(distribution: str, installed: Mapping[str, str]) -> str | None:
    """The installed version of a distribution, or of one that takes its place."""
    for library in LIBRARIES.values():
        if distribution == library.distributions[0]:
            names = (distribution, *library.distributions)
            return next((installed[name] for name in names if name in installed), None)
    return installed.get(distribution)
