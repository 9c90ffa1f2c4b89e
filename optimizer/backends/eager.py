"""The component itself, as runners.engines.eager stores it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from optimizer.backends import Built, How
from optimizer.progress import Progress

__all__ = ["build", "low_bit_layers"]


def build(source: Path, out: Path, how: How, progress: Progress) -> Built:  # noqa: ARG001
    """Copy config, layer table and weights into `out`."""
    files = {"config": "config.json", "layers": "layers.json", "weights": "weights.safetensors"}
    for name in files.values():
        shutil.copyfile(source / name, out / name)
    dtype = {"fp32": "f32"}.get(how.dtype, how.dtype)
    return Built(files=files, properties={"wrapper": how.wrapper, "dtype": dtype})


def low_bit_layers(engine: Any) -> int:  # noqa: ARG001
    """None: the oracle computes with dequantized weights in float."""
    return 0
