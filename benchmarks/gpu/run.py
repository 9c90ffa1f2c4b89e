"""What only a machine with a card can show, in one call: correctness first, then speed and memory.

    python -m benchmarks.gpu.run --section tensorrt --bundle out/bundle -o out/gpu.json
    python -m benchmarks.gpu.run --section sdxl -o out/gpu.json

The sections sd15, sdxl and flux need no bundle: full-size denoisers of random weights, eager, JIT
and ahead of time; `--small` takes small ones, for a machine without a card. A section takes under 8
minutes, needs no network, and merges its answers into the JSON file. What fails is an answer too,
in the library's own words.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.conditions import load_average, tool_versions
from benchmarks.gpu.denoisers import DENOISERS, ROWS, measure_denoiser
from benchmarks.gpu.loras import measure_form
from benchmarks.gpu.peers import published
from profiles.errors import KilnError
from runners.bundle import Bundle, open_bundle
from runners.engines.base import DeviceEngine
from runners.manifest import ComponentEntry
from runners.modules import WRAPPERS, component_from_config
from runners.pipeline import open_engine
from runners.selftest import check_calls
from runners.trust import load_trust

__all__ = ["main"]

_ROUNDS, _WARM = 30, 5


@click.command()
@click.option("--section", type=click.Choice(["bundle", "tensorrt", *DENOISERS]), required=True)
@click.option("--bundle", type=click.Path(path_type=Path), help="Of the first two sections.")
@click.option("--trust", type=click.Path(path_type=Path), help="NAME.pub of whoever signed it.")
@click.option("--rows", default=",".join(ROWS), show_default=True, help="Ways of a denoiser.")
@click.option("--small", is_flag=True, help="A small denoiser: for machines without a card.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="JSON file.")
def main(
    section: str,
    *,
    bundle: Path | None,
    trust: Path | None,
    rows: str,
    small: bool,
    out: Path,
) -> None:
    """Run a section and merge what it found into OUT."""
    chosen = tuple(rows.split(","))
    if unknown := set(chosen) - set(ROWS):
        raise click.BadParameter(
            f"{min(unknown)} is none of {', '.join(ROWS)}", param_hint="--rows"
        )
    if section in DENOISERS:
        found = measure_denoiser(section, chosen, _interleaved, small=small)
    elif bundle is None:
        raise click.BadParameter(f"the section {section} measures one", param_hint="--bundle")
    else:
        found = _bundle(bundle, trust)
    document = json.loads(out.read_text("utf-8")) if out.is_file() else {}
    document["published_by_others"] = published()
    document[section] = {"conditions": _conditions(), **found}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(json.dumps(document[section], indent=1))


def _conditions() -> dict[str, Any]:
    found: dict[str, Any] = {"load_average": load_average(), "versions": tool_versions()}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found["card"] = {
            "name": torch.cuda.get_device_name(),
            "capability": f"{major}.{minor}",
            "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
            "cuda": torch.version.cuda,
        }
    return found


def _bundle(path: Path, trust: Path | None) -> dict[str, Any]:
    """Every engine of the bundle: does it load, are its numbers right, how fast is it."""
    bundle = open_bundle(path, trust=load_trust(trust))
    rows = {}
    for entry in bundle.manifest.engines:
        rows[entry.name] = _component(bundle, entry)
    return {"built_for": bundle.manifest.components[0].requires.capabilities, "components": rows}


def _component(bundle: Bundle, entry: ComponentEntry) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    row: dict[str, Any] = {}
    try:
        start = time.perf_counter()
        with open_engine(bundle, entry, threads=1) as engine:
            row["load_seconds"] = round(time.perf_counter() - start, 3)
            row["sqnr_db"] = check_calls(bundle, entry, engine)
            row["needed_db"] = entry.selftest_db
            assert isinstance(engine, DeviceEngine)
            feeds = _feeds(entry, device)
            row |= _interleaved(
                {"engine": lambda: engine.on_device(feeds), **_peers(bundle, entry)}
            )
        if "lora" in entry.forms:
            row["lora"] = measure_form(bundle, entry, feeds, _interleaved)
    except KilnError as error:
        row["refused"] = str(error)
        row |= _interleaved(_peers(bundle, entry))
    return row


def _feeds(entry: ComponentEntry, device: str) -> dict[str, torch.Tensor]:
    """Random inputs of the best size, on the card."""
    sizes = {dim.name: dim.nearest(dim.opt) for dim in entry.signature.dims}
    generator = torch.Generator().manual_seed(0)
    found = {}
    for spec in entry.signature.inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes]
        if spec.dtype == "int64":
            tensor = torch.randint(0, 70, shape, generator=generator)
        else:
            tensor = torch.randn(shape, generator=generator)
        found[spec.name] = tensor.to(device)
    return found


def _peers(bundle: Bundle, entry: ComponentEntry) -> dict[str, Callable[[], Any]]:
    """The same architecture in torch, random weights: eager and, on a card, torch.compile."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    component = component_from_config(bundle.json(entry.config)).to_empty(device=device)
    for tensor in (*component.parameters(), *component.buffers()):
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.02)
        else:
            tensor.zero_()
    module = WRAPPERS[entry.wrapper](component.to(dtype).eval())
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in _feeds(entry, device).values()]

    @torch.inference_mode()
    def eager() -> Any:
        return module(*inputs)

    if device == "cpu":
        return {"eager": eager}
    compiled = torch.compile(module, mode="max-autotune")

    @torch.inference_mode()
    def jit() -> Any:
        return compiled(*inputs)

    return {"eager": eager, "torch.compile": jit}


def _interleaved(contestants: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Median ms of each, called in turn, and the peak of the card's memory in its own calls."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    peaks: dict[str, int] = {}
    for run in contestants.values():
        for _ in range(_WARM):
            run()
    for _ in range(_ROUNDS):
        for name, run in contestants.items():
            _synchronize(reset=True)
            start = time.perf_counter()
            run()
            peaks[name] = max(peaks.get(name, 0), _synchronize(reset=False))
            times[name].append(time.perf_counter() - start)
    return {
        "ms": {name: round(1000 * statistics.median(found), 4) for name, found in times.items()},
        "peak_bytes": peaks,
    }


def _synchronize(*, reset: bool) -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return int(peak)


if __name__ == "__main__":
    main()
