"""Decoding in seamless tiles against decoding whole pictures: peak, seconds and difference.

Each case is decoded in a fresh process, whose peak is taken above what it had before any engine
opened. The latents are those of a sheet of the reference model's pictures, encoded whole.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runners.console import Console

__all__ = ["lines", "measure"]

_REFERENCE = Path(__file__).with_name("reference_model")
_SIDES = (128, 256, 512)
_BACKENDS = ("openvino", "onnxruntime")
_OPTIONS = ("--quant", "none", "--no-lora", "--size-range", "32:512", "--steps", "2")


def measure(console: Console, out: Path) -> dict[str, Any]:
    """The reference model's decoder at three sizes, in tiles of 64 px and without."""
    rows = []
    for backend in _BACKENDS:
        bundle = out / "tiles" / backend
        command = [sys.executable, "-m", "runners.cli", "compile", str(_REFERENCE / "model")]
        with console.stage(f"Compile for {backend}"):
            given = [*_OPTIONS, "--backend", backend, "--force", "-o", str(bundle)]
            subprocess.run([*command, *given], check=True, capture_output=True)
        with console.stage(f"Decode with {backend}", len(_SIDES)) as stage:
            for side in _SIDES:
                rows.append({"backend": backend, "side": side, **measure_side(bundle, side)})
                stage.advance()
    return {"rows": rows}


def measure_side(bundle: Path, side: int) -> dict[str, Any]:
    """One size: what both ways take, and by how much they differ in 255ths of the range."""
    import numpy as np

    with tempfile.TemporaryDirectory() as private:
        latents = Path(private) / "latents.npy"
        _child(bundle, side, "encode", latents)
        whole, tiled = (_child(bundle, side, way, latents) for way in ("whole", "tiled"))
        images = [np.load(latents.with_name(f"{way}.npy")) for way in ("whole", "tiled")]
    apart = np.abs(images[0] - images[1]) * 127.5
    return {
        "whole": whole,
        "tiled": tiled,
        "mean_difference": round(float(apart.mean()), 4),
        "max_difference": round(float(apart.max()), 3),
    }


def _child(bundle: Path, side: int, way: str, latents: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.tiles", str(bundle), str(side), way, str(latents)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def _main(bundle: Path, side: int, way: str, latents: Path) -> None:
    """Encode a picture into `latents`, or decode them into WAY.npy beside them."""
    import numpy as np
    import torch

    import runners
    from runners import gauge

    pipeline = runners.load(bundle, threads=1)
    if way == "encode":
        image = torch.from_numpy(_picture(side))
        np.save(latents, pipeline.vae.encode(image).latent_dist.mean.numpy())
        print(json.dumps({}))
        return
    given = torch.from_numpy(np.load(latents))
    if way == "tiled":
        pipeline.vae.enable_tiling()
    gauge.trim()
    before = gauge.resident_bytes()
    gauge.reset_peak()
    image = pipeline.vae.decode(given).sample
    peak = gauge.peak_bytes() - before
    start = time.perf_counter()
    pipeline.vae.decode(given)
    seconds = time.perf_counter() - start
    np.save(latents.with_name(f"{way}.npy"), image.clamp(-1, 1).numpy())
    print(json.dumps({"peak_bytes": peak, "seconds": round(seconds, 3)}))


def _picture(side: int) -> Any:
    """A sheet of the reference model's pictures, [1, 3, side, side] in -1..1."""
    import numpy as np
    from PIL import Image

    with Image.open(_REFERENCE / "samples.png") as sheet:
        size = min(sheet.size)
        square = sheet.convert("RGB").crop((0, 0, size, size)).resize((side, side))
    pixels = np.asarray(square, np.float32).transpose(2, 0, 1)[None]
    return np.ascontiguousarray(pixels / 127.5 - 1)


def lines(found: Mapping[str, Any]) -> list[str]:
    """The rows as a table."""
    said = ["decoding whole and in seamless tiles of 64 px: peak above the process's own, seconds"]
    for row in found["rows"]:
        whole, tiled = row["whole"], row["tiled"]
        said.append(
            f"  {row['backend']:<12}{row['side']:>5} px: {whole['peak_bytes'] / 1e6:>7.0f} MB and "
            f"{tiled['peak_bytes'] / 1e6:>5.0f} MB, {whole['seconds']:>6.2f} s and "
            f"{tiled['seconds']:>6.2f} s, differing by {row['mean_difference']:.3f}/255 on "
            f"average, {row['max_difference']:.2f}/255 at most"
        )
    return said


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
