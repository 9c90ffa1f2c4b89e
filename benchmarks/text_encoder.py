"""A large text encoder in torch: T5's blocks as `--backend eager` runs them, beside the libraries.

Two of the 24 blocks of T5 v1.1 XXL (FLUX.1's and SD3's) with random weights, all ways in turn in
one process. Random weights have none of the outliers of trained ones: the decibels compare ways.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.watching import found_apart
from runners.console import Console

__all__ = ["lines", "measure", "measure_ways"]

_T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
"""google/t5-v1_1-xxl's config.json."""
_BLOCKS = 2
_TOKENS = (77, 512)
"""SD3's prompts without options, and FLUX.1-dev's."""
_LEVELS = ("int8w", "int8-dyn", "llm-int8", "torchao-int8-dyn", "nf4")
_BASELINES = ("torchao-int8", "torchao-int8-dyn", "bitsandbytes-int8", "bitsandbytes-nf4")
_PLAIN = "torch"


def measure(console: Console, _out: Path) -> dict[str, Any]:
    """Seconds of a prompt, decibels from fp32 and bytes for each way; libraries that are here."""
    title = "Text encoder: two blocks of T5 XXL"
    return found_apart(console, title, f"{__name__}:measure_ways", (_T5_XXL, _BLOCKS, _TOKENS))


def lines(found: Mapping[str, Any]) -> list[str]:
    """What `kiln bench` prints."""
    return [
        f"T5's blocks, {dtype}, {way}: {row['bytes'] / 1e6:.0f} MB, "
        + ", ".join(
            f"{tokens} tokens {1000 * one['seconds']:.0f} ms ({one['speed']:.2f}x)"
            for tokens, one in row["tokens"].items()
        )
        + (f", {row['db']:.1f} dB from fp32" if "db" in row else "")
        for dtype, rows in found["dtypes"].items()
        for way, row in rows.items()
    ]


def measure_ways(
    sizes: Mapping[str, Any],
    blocks: int,
    lengths: tuple[int, ...],
    out: Path,
    progress: Callable[[int, int], None],
    rounds: int = 9,
) -> None:
    """Write the document of `measure` into the file `out`; `sizes` is the encoder's config.

    Speeds are those of torch's own floats of the same dtype over a way's.
    """
    import torch

    from optimizer.quantize.policy import LEVELS
    from optimizer.tools import LIBRARIES
    from runners.engines.eager import eager_module

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    torch.manual_seed(0)
    config = {**sizes, "num_layers": blocks, "dropout_rate": 0.0, "model_type": "t5"}
    plain = _encoder(config)
    prompts = [torch.randint(0, sizes["vocab_size"], (1, length)) for length in lengths]
    with torch.inference_mode():
        exact = [plain(tokens).last_hidden_state for tokens in prompts]
    levels = [name for name in _LEVELS if _has(LIBRARIES.get(LEVELS[name].format, "torch"))]
    prepared, found = {}, {}
    for done, level in enumerate(levels):
        progress(done, len(levels) + len(dtypes))
        prepared[level] = _prepared(plain, level)
    for done, (dtype, kind) in enumerate(dtypes.items()):
        progress(len(levels) + done, len(levels) + len(dtypes))
        changed = copy.deepcopy(plain).to(kind)
        ways = {_PLAIN: changed}
        for level, made in prepared.items():
            ways[level] = eager_module(*made).to(kind)
        for name in _BASELINES:
            if _has(name.split("-")[0]):
                ways[name] = _theirs(changed, name)
        found[dtype] = _measured(ways, dtype, prompts, exact, rounds)
    document = {"blocks": blocks, "threads": torch.get_num_threads(), "dtypes": found}
    out.write_text(json.dumps(document), "utf-8")


def _measured(
    ways: Mapping[str, Any], dtype: str, prompts: Sequence[Any], exact: Sequence[Any], rounds: int
) -> dict[str, Any]:
    """The rows of one dtype: `exact` holds what fp32 makes of the prompts."""
    rows: dict[str, dict[str, Any]] = {
        name: {"bytes": _bytes(module), "tokens": {}} for name, module in ways.items()
    }
    for tokens, wanted in zip(prompts, exact, strict=True):
        outputs, seconds = _in_turn(ways, tokens, rounds)
        floats = statistics.median(seconds[_PLAIN])
        for name, row in rows.items():
            median = statistics.median(seconds[name])
            row["tokens"][tokens.shape[1]] = {
                "seconds": round(median, 4),
                "speed": round(floats / median, 3),
            }
            if name != _PLAIN or dtype != "fp32":
                row["db"] = round(_decibels(wanted, outputs[name]), 1)
    return rows


def _has(library: str) -> bool:
    return find_spec(library) is not None


def _encoder(config: Mapping[str, Any]) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**config)).eval()


def _prepared(plain: Any, level: str) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """What a bundle with `--text-quant LEVEL` holds of the module, as the eager engine takes it."""
    from safetensors.torch import save

    from optimizer.quantize.apply import planned_layers, quantized_layers
    from optimizer.quantize.policy import LEVELS, Policy, Rule
    from runners.engines.eager import eager_state
    from runners.quantized import insert_quantized

    policy = Policy(rules=(Rule(pattern="*", scheme=LEVELS[level]),), solver="mse")
    module = copy.deepcopy(plain)
    insert_quantized(module, quantized_layers(module, planned_layers(module, policy), {}, "mse"))
    layers, state = eager_state(module)
    config = {**plain.config.to_dict(), "_class_name": "T5EncoderModel"}
    return config, layers, save(state)


def _theirs(plain: Any, baseline: str) -> Any:
    from benchmarks.baselines import change_linears

    module = copy.deepcopy(plain)
    change_linears(module.encoder, baseline, kept=("wo",))  # as transformers does with T5
    return module


def _bytes(module: Any) -> int:
    """Of all tensors that it holds but the embeddings, which are the same in all ways."""
    held = [*module.encoder.block.parameters(), *module.encoder.block.buffers()]
    return sum(_stored(tensor) for tensor in held)


def _stored(tensor: Any) -> int:
    """Of a tensor, or of what a library's tensor keeps in its place."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    return sum(_stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def _in_turn(
    ways: Mapping[str, Any], tokens: Any, rounds: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    import torch

    outputs: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for name, module in ways.items():
            outputs[name] = module(tokens).last_hidden_state
        for _ in range(rounds):
            for name, module in ways.items():
                start = time.perf_counter()
                module(tokens)
                seconds[name].append(time.perf_counter() - start)
    return outputs, seconds


def _decibels(exact: Any, found: Any) -> float:
    """Signal to noise of the last hidden states."""
    noise = float((found.double() - exact.double()).square().sum())
    return 10 * math.log10(float(exact.double().square().sum()) / noise)
