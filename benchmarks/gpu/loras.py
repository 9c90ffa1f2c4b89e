"""An engine's form with LoRAs: does it change what it gives, does it come back, what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from optimizer.numerics import worst_sqnr_db
from profiles.errors import KilnError
from runners.bundle import Bundle
from runners.engines.base import DeviceEngine, Engine
from runners.lora_inputs import lora_targets
from runners.manifest import ComponentEntry
from runners.pipeline import open_engine
from runners.signature import Signature

__all__ = ["measure_form"]

_RANK, _CHANGES = 32, 5


def measure_form(
    bundle: Bundle,
    entry: ComponentEntry,
    feeds: Mapping[str, Tensor],
    interleaved: Callable[[dict[str, Callable[[], Any]]], dict[str, Any]],
) -> dict[str, Any]:
    """SQNR in dB of what the form gives against the plain engine, with a LoRA of rank 32 on every
    layer (`with_db`) and with that and its negative stacked, which leaves only rounding
    (`cancelled_db`); seconds of loading and changes, ms of both engines' calls in turn.
    """
    signature = entry.forms["lora"].signature
    row: dict[str, Any] = {"rank": _RANK}
    try:
        with (
            open_engine(bundle, entry, threads=1) as plain,
            open_engine(bundle, entry, form="lora", threads=1) as formed,
        ):
            wanted = _called(plain, feeds)
            loras = [_random(signature, seed) for seed in (0, 1)]
            both = _stacked(loras[0], _negative(loras[0]))
            row["first_hold_seconds"] = _held(formed, loras[0])
            row["with_db"] = _db(wanted, _called(formed, feeds))
            row["hold_seconds"] = [_held(formed, loras[i % 2]) for i in range(_CHANGES)]
            row |= interleaved(
                {"plain": lambda: _called(plain, feeds), "lora": lambda: _called(formed, feeds)}
            )
            _held(formed, both)
            row["cancelled_db"] = _db(wanted, _called(formed, feeds))
    except KilnError as error:
        row["refused"] = str(error)
    return row


def _held(engine: Engine, lora: Mapping[str, Tensor]) -> float:
    """Seconds of holding it; the tensors are where the engine wants them before."""
    on_card = isinstance(engine, DeviceEngine)
    given = {name: x.to("cuda") if on_card else x.numpy() for name, x in lora.items()}
    if on_card:
        torch.cuda.synchronize()
    start = time.perf_counter()
    engine.hold(given)
    if on_card:
        torch.cuda.synchronize()
    return round(time.perf_counter() - start, 4)


def _called(engine: Engine, feeds: Mapping[str, Tensor]) -> dict[str, Any]:
    if isinstance(engine, DeviceEngine):
        return engine.on_device(feeds)
    return engine({name: tensor.cpu().numpy() for name, tensor in feeds.items()})


def _random(signature: Signature, seed: int) -> dict[str, Tensor]:
    """Every layer's A [in, rank(, height, width)] and B [rank, out]."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for layer, target in lora_targets(signature).items():
        down = torch.randn(target.inputs, _RANK, *target.kernel, generator=generator)
        up = torch.randn(_RANK, target.outputs, generator=generator)
        found |= {f"{layer}.lora_A": 0.01 * down, f"{layer}.lora_B": 0.01 * up}
    return found


def _negative(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: -x if name.endswith(".lora_B") else x for name, x in lora.items()}


def _stacked(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    axes = {name: int(name.endswith(".lora_A")) for name in one}
    return {name: torch.cat([one[name], other[name]], axes[name]) for name in one}


def _db(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """The worst output's."""
    pair = [[torch.as_tensor(one[n]).cpu().numpy() for n in wanted] for one in (wanted, found)]
    return round(worst_sqnr_db([(pair[0], pair[1])]), 2)
