"""Full-size models of random weights as bundles, for several sections of `kiln bench`."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.watching import watched
from runners.console import Console

__all__ = ["FULL_SIZE", "OPTIONS", "full_bundle"]

OPTIONS = (
    *("--size-range", "256:512", "--calibration-size", "256", "--steps", "2", "--batch", "1"),
)
"""Of `kiln compile`, for all of them."""


@dataclass(frozen=True)
class _Model:
    title: str
    make: str
    """module:function that writes it, as optimizer.worker takes it."""
    options: tuple[str, ...] = ()
    """Further ones of its compile."""


FULL_SIZE = {
    "sd15": _Model("Stable Diffusion 1.5", "benchmarks.full_models:make_sd15"),
    "sdxl": _Model("SDXL", "benchmarks.full_models:make_sdxl", ("--no-lora",)),
}


def full_bundle(
    name: str, out: Path, console: Console, backend: str = "openvino", quant: str = "int8"
) -> Path:
    """The bundle of a model of `FULL_SIZE` below `out`, compiled where it isn't there yet."""
    from optimizer.worker import run_stage

    model, bundle = FULL_SIZE[name], out / "full-size" / f"{name}-{backend}-{quant}"
    if bundle.is_dir():
        return bundle
    with tempfile.TemporaryDirectory() as private:
        with console.stage(f"Full-size {model.title}: make weights") as stage:
            run_stage(model.make, (Path(private),), progress=stage.progress)
        command = [sys.executable, "-m", "runners.cli", "compile", private, "--quant", quant]
        options = (*OPTIONS, *model.options, "--backend", backend)
        with console.stage(f"Full-size {model.title}: compile for {backend}"):
            watched([*command, *options, "-o", str(bundle)], dict(os.environ))
    return bundle
