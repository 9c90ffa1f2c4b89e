"""The component itself, as runners.engines.eager stores it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from optimizer.backends import Built, How
from optimizer.progress import Progress

__all__ = ["build", "build_form", "low_bit_layers"]


def build(source: Path, out: Path, how: How, progress: Progress) -> Built:  # noqa: ARG001
    """Copy config, layer table and weights into `out`."""
    files = {"config": "config.json", "layers": "layers.json", "weights": "weights.safetensors"}
    for name in files.values():
        shutil.copyfile(source / name, out / name)
    dtype = {"fp32": "f32"}.get(how.dtype, how.dtype)
    return Built(files=files, properties={"wrapper": how.wrapper, "dtype": dtype})


def build_form(source: Path, engine: Path, out: Path, how: How) -> Built:  # noqa: ARG001
    """Nothing new but the way in which the component is called."""
    plain = json.loads((engine / "built.json").read_text("utf-8"))
    return Built(plain["files"], {**plain["properties"], "wrapper": how.wrapper})


def low_bit_layers(engine: Any) -> int:  # noqa: ARG001
    """None: the oracle computes with dequantized weights in float."""
    return 0
