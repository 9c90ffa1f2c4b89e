"""LoRAs on engines, measured: what loading, swapping and running with one costs, in one process."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.full_bundles import full_bundle
from benchmarks.watching import found_apart, watched
from runners.console import Console

__all__ = [
    "lines",
    "lines_of_backends",
    "lines_of_full_size",
    "measure",
    "measure_backends",
    "measure_bundle",
    "measure_full_size",
    "measure_noise",
]

_REFERENCE = Path(__file__).with_name("reference_model")
_MODEL = _REFERENCE / "model"
_LORA = _REFERENCE / "loras" / "greys.safetensors"
_PROMPTS = (
    "a large red circle on the left, on a plain blue background",
    "a small green square on the right, on a plain white background",
    "a large yellow triangle in the middle, on a plain black background",
    "a small blue circle on the right, on a plain red background",
)
_BACKENDS = (
    ("onnxruntime", "int8"),
    ("eager", "none"),
    ("eager", "int8w"),
    ("aoti-blocks", "none"),
    ("aoti", "none"),
    ("aoti", "int8"),
)
_FULL_SIZE = (("openvino", "int8"), *_BACKENDS)
_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "proj_out")
"""What kohya's trainer changes of a UNet by default: all of its transformers."""


def measure(console: Console, _out: Path) -> dict[str, Any]:
    """The reference model in int8, LoRAs of rank 4 and 8; what its own one leaves of its SQNR."""
    with tempfile.TemporaryDirectory() as private:
        bundle = Path(private) / "bundle"
        command = [sys.executable, "-m", "runners.cli", "compile", str(_MODEL), "--quant", "int8"]
        with console.stage("LoRA: compile the reference model"):
            watched([*command, "-o", str(bundle)], dict(os.environ))
        found = _measured(console, "reference model", bundle, (4, 8))
        found |= _found(console, "compare with fp32", "measure_noise", (bundle, _MODEL, _LORA))
    return found


def measure_backends(console: Console, out: Path) -> dict[str, Any]:
    """The reference model, LoRAs of rank 4 and 8: backend and level -> figures.

    Bundles are kept below `out`: packages take many minutes to compile.
    """
    found = {}
    for backend, quant in _BACKENDS:
        name = f"{backend} {quant}"
        bundle = out / "lora" / f"{backend}-{quant}"
        if not bundle.is_dir():
            command = [sys.executable, "-m", "runners.cli", "compile", str(_MODEL)]
            options = ("--backend", backend, "--quant", quant, "-o", str(bundle))
            with console.stage(f"LoRA: compile the reference model for {name}"):
                watched([*command, *options], dict(os.environ))
        found[name] = _measured(console, f"reference model on {name}", bundle, (4, 8))
    return found


def measure_full_size(console: Console, out: Path) -> dict[str, Any]:
    """A Stable Diffusion 1.5 of random weights, LoRAs of rank 32: backend and level -> figures."""
    found = {}
    for backend, quant in _FULL_SIZE:
        name = f"{backend} {quant}"
        bundle = full_bundle("sd15", out, console, backend, quant)
        found[name] = _measured(console, f"full size on {name}", bundle, (32, 32))
    return found


def _measured(console: Console, title: str, bundle: Path, ranks: tuple[int, int]) -> dict[str, Any]:
    return _found(console, f"measure the {title}", "measure_bundle", (bundle, ranks))


def _found(
    console: Console, title: str, function: str, arguments: tuple[object, ...]
) -> dict[str, Any]:
    return found_apart(console, f"LoRA: {title}", f"{__name__}:{function}", arguments)


def lines(found: Mapping[str, Any]) -> list[str]:
    """What `kiln bench` prints."""
    told = [
        f"LoRA: swap {1000 * found['swap_seconds']:.0f} ms, first load "
        f"{found['first_load_seconds']:.2f} s, a step with rank {found['ranks'][0]} at "
        f"{found['speed_with_lora']:.2f}x of the speed without"
    ]
    if db := found.get("sqnr_db"):
        told.append(
            f"LoRA: {db['with']:.1f} dB with the reference's own, {db['without']:.1f} without"
        )
    return told


def lines_of_full_size(found: Mapping[str, Any]) -> list[str]:
    """The same of every backend of the full size."""
    return _lines_of(found)


def lines_of_backends(found: Mapping[str, Any]) -> list[str]:
    """The same of every backend of the reference model."""
    return _lines_of(found)


def _lines_of(found: Mapping[str, Any]) -> list[str]:
    measured = {name: one for name, one in found.items() if name != "conditions"}
    return [f"{name}: {line}" for name, one in measured.items() for line in lines(one)]


def measure_bundle(
    bundle: Path,
    ranks: tuple[int, int],
    out: Path,
    progress: Callable[[int, int], None],
    rounds: int = 15,
) -> None:
    """Write into the file `out` seconds of steps, plain and with a LoRA, and of changes.

    Steps of both kinds are taken in turn, by two pipelines; a change is timed with the step after
    it, less another step: an engine gets ready when it is called.
    """
    import runners

    pipeline, beside = (runners.load(bundle) for _ in range(2))
    files = [
        _random_lora(pipeline, out.with_name(f"{i}.safetensors"), rank)
        for i, rank in enumerate(ranks)
    ]
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
        "form_bytes": _own_bytes(pipeline.kiln.manifest, entry),
        "plain_step_seconds": round(without, 4),
        "lora_step_seconds": round(with_lora, 4),
        "speed_with_lora": round(statistics.median(plain / lora for plain, lora in pairs), 3),
        "first_load_seconds": round(loading - with_lora, 3),
        "second_load_seconds": round(adding - with_lora, 3),
        "swap_seconds": round(statistics.median(swaps), 4),
        "slowest_swap_seconds": round(max(swaps), 4),
        "unload_seconds": round(leaving - without, 3),
    }
    out.write_text(json.dumps(document), "utf-8")
    pipeline.kiln.close()
    beside.kiln.close()


def _own_bytes(manifest: Any, entry: Any) -> int:
    """What the form with LoRAs takes beside the plain engine's files."""
    own = set(entry.forms["lora"].files.values()) - set(entry.files.values())
    return sum(manifest.files[name].size for name in own)


def measure_noise(bundle: Path, model: Path, lora: Path, out: Path, steps: int = 20) -> None:
    """Write into the file `out` the denoiser's SQNR in dB without and with a LoRA.

    Each call of fp32 runs with diffusers, drawn without and with it, is made on the engine too;
    `latents_changed_by` is the LoRA's relative change of the runs' last latents, in fp32.
    """
    import torch
    from diffusers import DiffusionPipeline

    import runners

    engine = runners.load(bundle)
    reference = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    noise = _Noise(engine.unet)
    reference.unet.register_forward_hook(noise, with_kwargs=True)
    plain = _latents(reference, steps)
    found = {"without": noise.taken_db()}
    for pipeline in (reference, engine):
        pipeline.load_lora_weights(lora, adapter_name="one")
    changed = _latents(reference, steps)
    found["with"] = noise.taken_db()
    document = {
        "sqnr_db": found,
        "latents_changed_by": round(float((changed - plain).norm() / plain.norm()), 3),
    }
    out.write_text(json.dumps(document), "utf-8")
    engine.kiln.close()


class _Noise:
    """A forward hook: the energy of what comes out, and of what an engine makes of the same."""

    def __init__(self, engine: Callable[..., Any]) -> None:
        self._engine = engine
        self._signal = self._error = 0.0

    def __call__(self, _module: Any, inputs: Any, given: Mapping[str, Any], outputs: Any) -> None:
        """Call the engine as the module was called."""
        sample, timestep = inputs
        got = self._engine(sample, timestep, given["encoder_hidden_states"])[0]
        self._signal += float(outputs[0].double().square().sum())
        self._error += float((outputs[0] - got).double().square().sum())

    def taken_db(self) -> float:
        """The ratio so far, from which the next one starts anew."""
        found = 10 * math.log10(self._signal / self._error)
        self._signal = self._error = 0.0
        return round(found, 2)


def _latents(pipeline: Any, steps: int) -> Any:
    """Those of each prompt's run, from noise of its own."""
    import torch

    found = []
    for seed, prompt in enumerate(_PROMPTS):  # an engine may take one picture at a time
        generator = torch.Generator().manual_seed(seed)
        how = {"num_inference_steps": steps, "output_type": "latent", "generator": generator}
        found.append(pipeline(prompt, **how).images)
    return torch.cat(found)


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
