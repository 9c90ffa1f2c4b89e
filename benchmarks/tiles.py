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

__all__ = ["lines", "lines_of_full_size", "measure", "measure_full_size"]

_REFERENCE = Path(__file__).with_name("reference_model")
_SIDES = (128, 256, 512)
_BACKENDS = ("openvino", "onnxruntime")
_FULL_SIDES = (512, 1024, 1536, 2048)
_LARGEST_WHOLE = 1024
"""Of those, in pixels: a whole picture of 2048 px takes 14 GB."""
_PEAKS = ("peak of whole", "peak of tiles")
_FULL_OPTIONS = (
    *("--quant", "none", "--no-lora", "--size-range", "256:2048", "--calibration-size", "256"),
    *("--steps", "2", "--batch", "1"),
)
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


def measure_full_size(console: Console, out: Path) -> dict[str, Any]:
    """The peak of Stable Diffusion 1.5's decoder at four sizes, in tiles of 512 px and without.

    In tiles the first round is run alone: later ones call the same engines with the same shapes.
    """
    from optimizer.worker import run_stage

    rows = []
    with tempfile.TemporaryDirectory() as private:
        model = Path(private) / "model"
        with console.stage("Full-size VAE: make weights") as stage:
            run_stage("benchmarks.full_models:make_sd15_vae", (model,), progress=stage.progress)
        for backend in _BACKENDS:
            bundle = out / "tiles-full-size" / backend
            command = [sys.executable, "-m", "runners.cli", "compile", str(model)]
            with console.stage(f"Full-size VAE: compile for {backend}"):
                given = [*_FULL_OPTIONS, "--backend", backend, "--force", "-o", str(bundle)]
                subprocess.run([*command, *given], check=True, capture_output=True)
            for side in _FULL_SIDES:
                with console.stage(f"Full-size VAE: decode at {side} px with {backend}"):
                    rows.append({"backend": backend, "side": side, **_peaks(bundle, side)})
    return {"rows": rows}


def _peaks(bundle: Path, side: int) -> dict[str, int | None]:
    """Whole and in tiles, of latents of noise; None: too large."""
    whole, tiled = (
        None
        if way == _PEAKS[0] and side > _LARGEST_WHOLE
        else _child(bundle, side, way, bundle)["peak_bytes"]
        for way in _PEAKS
    )
    return {"whole_peak_bytes": whole, "tiled_peak_bytes": tiled}


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
    """Encode a picture into `latents`, decode them into WAY.npy beside them, or decode noise, of
    which `_PEAKS` want the peak alone.
    """
    import numpy as np
    import torch

    import runners
    from runners import seamless

    if way in _PEAKS:
        pipeline = runners.load(bundle)
        seamless.ROUNDS = 0
        pipeline.vae.use_tiling = way == _PEAKS[1]
        _, peak = _decoded(pipeline.vae, torch.randn(1, 4, side // 8, side // 8))
        print(json.dumps({"peak_bytes": peak}))
        return
    pipeline = runners.load(bundle, threads=1)
    if way == "encode":
        image = torch.from_numpy(_picture(side))
        np.save(latents, pipeline.vae.encode(image).latent_dist.mean.numpy())
        print(json.dumps({}))
        return
    given = torch.from_numpy(np.load(latents))
    pipeline.vae.use_tiling = way == "tiled"
    image, peak = _decoded(pipeline.vae, given)
    start = time.perf_counter()
    pipeline.vae.decode(given)
    seconds = time.perf_counter() - start
    np.save(latents.with_name(f"{way}.npy"), image.clamp(-1, 1).numpy())
    print(json.dumps({"peak_bytes": peak, "seconds": round(seconds, 3)}))


def _decoded(vae: Any, latents: Any) -> tuple[Any, int]:
    """The image, and the peak above what the process had before."""
    from runners import gauge

    gauge.trim()
    before = gauge.resident_bytes()
    gauge.reset_peak()
    image = vae.decode(latents).sample
    return image, gauge.peak_bytes() - before


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


def lines_of_full_size(found: Mapping[str, Any]) -> list[str]:
    """The rows of the full-size decoder."""
    said = ["decoding with a full-size decoder, whole and in seamless tiles of 512 px: peak"]
    for row in found["rows"]:
        whole = row["whole_peak_bytes"]
        said.append(
            f"  {row['backend']:<12}{row['side']:>5} px: "
            f"{'not run' if whole is None else f'{whole / 1e6:.0f} MB'} and "
            f"{row['tiled_peak_bytes'] / 1e6:.0f} MB"
        )
    return said


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
