"""ONNX -> ONNX Runtime: the exported file itself, weights beside it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from optimizer.backends import Built

__all__ = ["build", "low_bit_layers"]


def build(source: Path, out: Path, *, dtype: str, role: str) -> Built:  # noqa: ARG001
    """Copy graph and weights into `out`; the session optimizes when it opens."""
    shutil.copyfile(source / "model.onnx", out / "model.onnx")
    weights = source / "model.onnx.data"
    if weights.is_file():
        shutil.copyfile(weights, out / "model.onnx.data")
    else:
        (out / "model.onnx.data").touch()
    return Built(
        files={"graph": "model.onnx", "weights": "model.onnx.data"},
        properties={"weights_location": "model.onnx.data"},
    )


def low_bit_layers(engine: Any) -> None:
    """Unknown: a session doesn't tell which kernels it chose."""
