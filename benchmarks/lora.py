"""LoRAs on engines, measured: what loading, swapping and running with one costs, in one process."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.full_bundles import FULL_SIZE, full_bundle
from benchmarks.watching import watched
from runners.console import Console

__all__ = ["lines", "measure", "measure_bundle", "measure_full_size"]

_MODEL = Path(__file__).with_name("reference_model") / "model"
_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "proj_out")
"""What kohya's trainer changes of a UNet by default: all of its transformers."""


def measure(console: Console, _out: Path) -> dict[str, Any]:
    """The reference model in int8, LoRAs of rank 4 and 8."""
    with tempfile.TemporaryDirectory() as private:
        bundle = Path(private) / "bundle"
        command = [sys.executable, "-m", "runners.cli", "compile", str(_MODEL), "--quant", "int8"]
        with console.stage("LoRA: compile the reference model"):
            watched([*command, "-o", str(bundle)], dict(os.environ))
        return _measured(console, "reference model", bundle, (4, 8))


def measure_full_size(console: Console, out: Path) -> dict[str, Any]:
    """A Stable Diffusion 1.5 of random weights in int8, LoRAs of rank 32."""
    title = f"full-size {FULL_SIZE['sd15'].title}"
    return _measured(console, title, full_bundle("sd15", out, console), (32, 32))


def _measured(console: Console, title: str, bundle: Path, ranks: tuple[int, int]) -> dict[str, Any]:
    from optimizer.worker import run_stage

    with tempfile.TemporaryDirectory() as private:
        out = Path(private)
        with console.stage(f"LoRA: measure the {title}") as stage:
            arguments = (bundle, ranks, out)
            run_stage("benchmarks.lora:measure_bundle", arguments, progress=stage.progress)
        found: dict[str, Any] = json.loads((out / "lora.json").read_text("utf-8"))
    return found


def lines(found: Mapping[str, Any]) -> list[str]:
    """What `kiln bench` prints."""
    return [
        f"LoRA: swap {1000 * found['swap_seconds']:.0f} ms, first load "
        f"{found['first_load_seconds']:.2f} s, a step with rank {found['ranks'][0]} at "
        f"{found['speed_with_lora']:.2f}x of the speed without"
    ]


def measure_bundle(
    bundle: Path,
    ranks: tuple[int, int],
    out: Path,
    progress: Callable[[int, int], None],
    rounds: int = 15,
) -> None:
    """Write lora.json: seconds of steps, plain and with a LoRA, and of changes between them.

    Steps of both kinds are taken in turn, by two pipelines; a change is timed with the step after
    it, less another step: an engine gets ready when it is called.
    """
    import runners

    pipeline, beside = (runners.load(bundle) for _ in range(2))
    files = [_random_lora(pipeline, out / f"{i}.safetensors", rank) for i, rank in enumerate(ranks)]
    step, plain_step = _step(pipeline), _step(beside)
    step()
    plain_step()
    progress(1, 4)
    loading = _seconds(lambda: (pipeline.load_lora_weights(files[0], "a"), step()))
    pairs = [(_seconds(plain_step), _seconds(step)) for _ in range(rounds)]
    progress(2, 4)
    adding = _seconds(lambda: (pipeline.load_lora_weights(files[1], "b"), step()))
    swaps = [_seconds(partial(_swap, pipeline, name, step)) - _seconds(step) for name in "abababab"]
    progress(3, 4)
    leaving = _seconds(lambda: (pipeline.unload_lora_weights(), step()))
    entry = pipeline.kiln.manifest.component("denoiser")
    without, with_lora = (statistics.median(times) for times in zip(*pairs, strict=True))
    document = {
        "backend": entry.backend,
        "quant": entry.quant,
        "dtype": entry.dtype,
        "threads": pipeline.kiln.threads,
        "ranks": ranks,
        "lora_bytes": [file.stat().st_size for file in files],
        "form_graph_bytes": pipeline.kiln.manifest.files[entry.forms["lora"].files["graph"]].size,
        "plain_step_seconds": round(without, 4),
        "lora_step_seconds": round(with_lora, 4),
        "speed_with_lora": round(statistics.median(plain / lora for plain, lora in pairs), 3),
        "first_load_seconds": round(loading - with_lora, 3),
        "second_load_seconds": round(adding - with_lora, 3),
        "swap_seconds": round(statistics.median(swaps), 4),
        "slowest_swap_seconds": round(max(swaps), 4),
        "unload_seconds": round(leaving - without, 3),
    }
    (out / "lora.json").write_text(json.dumps(document), "utf-8")
    pipeline.kiln.close()
    beside.kiln.close()


def _swap(pipeline: Any, name: str, step: Callable[[], Any]) -> None:
    pipeline.set_adapters(name)
    step()


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _step(pipeline: Any) -> Callable[[], Any]:
    """One call of the denoiser at the native size, guidance included."""
    import torch

    config, side = pipeline.unet.config, pipeline.unet.config.sample_size
    sample = torch.randn(2, config.in_channels, side, side)
    tokens = pipeline.text_encoder.config.max_position_embeddings
    text = torch.randn(2, tokens, config.cross_attention_dim)
    return lambda: pipeline.unet(sample, torch.tensor(500.0), text)


def _random_lora(pipeline: Any, path: Path, rank: int) -> Path:
    import safetensors.torch
    import torch

    from runners.lora_inputs import lora_targets

    entry = pipeline.kiln.manifest.component("denoiser")
    tensors = {}
    for name, target in lora_targets(entry.forms["lora"].signature).items():
        if not name.endswith(_TARGETS):
            continue
        ones = [1] * len(target.kernel)
        tensors[f"unet.{name}.lora_A.weight"] = torch.randn(rank, target.inputs, *ones) * 0.01
        tensors[f"unet.{name}.lora_B.weight"] = torch.randn(target.outputs, rank, *ones) * 0.01
    safetensors.torch.save_file(tensors, path)
    return path
