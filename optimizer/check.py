"""An engine, built and then judged: against fp32, compared with what the oracle loses."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from optimizer.backends import Built, backend, builder
from optimizer.calls import Call, load_calls, save_calls
from optimizer.footprint import measure
from optimizer.forms import neutral_feeds, prepared_forms
from optimizer.job import Job
from optimizer.numerics import worst_sqnr_db
from optimizer.progress import Progress, Steps
from optimizer.tile_check import built_parts
from profiles.errors import BuildError, ParityError
from runners.engines import engine_class
from runners.engines.base import Engine
from runners.part_names import AFTER, PARTS
from runners.signature import Signature

__all__ = ["build_and_check", "engine_db", "limit_db", "opened", "opened_proof"]

_DTYPE_DB = {"fp32": 80.0, "fp16": 40.0, "bf16": 28.0}
"""What computing in a type may lose by itself. fp32: 2e-6 relative (-114 dB) was seen, a wrong
constant or a fused approximation costs far more. fp16 has 11 significant bits (-66 dB an
operation); bf16 has 8 significant bits (-48 dB an operation);
whole UNets were seen at 36-39 dB (FACTS.md), deep untrained ones a few dB lower."""

_ENGINE_LOSS_DB = 1.0
"""How much more than the oracle an engine may lose: rounding flips cost less than half of it."""


def limit_db(oracle_db: float, dtype: str) -> float:
    """The least SQNR that is accepted: the oracle's noise and the dtype's, and 1 dB."""
    noise = 10 ** (-oracle_db / 10) + 10 ** (-_DTYPE_DB[dtype] / 10)
    return -10 * math.log10(noise) - _ENGINE_LOSS_DB


def build_and_check(
    job: Job, prepared: Path, recorded: Path, out: Path, progress: Progress
) -> None:
    """Build the engine into `out`, check it at two unseen sizes and on the recorded calls.

    Writes built.json: files, properties and everything measured. Raises ParityError, naming the
    component, the size and both numbers, where an engine's outputs are worse than `limit_db` or
    hold a NaN. Progress counts calls; building counts as a fifth of the recorded ones.
    """
    unseen = load_calls(prepared / "unseen.safetensors")
    smallest = load_calls(prepared / "smallest.safetensors")
    calls = load_calls(recorded / f"{job.spec.name}.safetensors")
    building = max(1, len(calls) // 5)
    steps = Steps(progress, building + len(unseen) + len(calls))
    built = builder(job.backend).build(
        prepared, out, job.how, lambda done, total: steps.within(building, done / total)
    )
    steps.advance(building)
    oracle = json.loads((prepared / "info.json").read_text("utf-8"))
    ran = engine_class(job.backend).usable_here(built.properties)
    unopened = opened(job, built, out) if ran else opened_proof(job, prepared, out)
    start = time.monotonic()
    with unopened as engine:
        seen = _seen(engine, start, calls, unseen, smallest, steps)
        low_bit = builder(job.backend).low_bit_layers(engine) if ran else built.low_bit_layers
    first = next(iter(calls.values()))
    on_processor = backend(job.backend).device == "cpu"
    memory = measure(job, built, folder=out, call=first) if ran and on_processor else None
    _require_low_bits(job, low_bit)
    for name, db in seen.unseen.items():
        _require(job, name, db, oracle["unseen_sqnr_db"][name])
    _require(job, "the recorded runs", seen.total, oracle["sqnr_db"])
    sampled = {**dict(list(unseen.items())[:1]), _RECORDED: first}
    alone = {**seen.unseen, _RECORDED: seen.first}
    forms = _forms(job, prepared, out, sampled, alone, ran=ran)
    if AFTER in job.forms:
        parts = built_parts(job, prepared, out)
        for where, db in parts.sqnr_db(sampled).items():
            _require(job, f"{where} in two parts", db, alone[where])
        forms |= parts.document(first, measures=memory is not None)
    document: dict[str, Any] = {
        **oracle,
        "forms": forms,
        "oracle_sqnr_db": oracle["sqnr_db"],
        "files": built.files,
        "properties": built.properties,
        "sqnr_db": seen.total,
        "unseen_sqnr_db": seen.unseen,
        "layers_low_bit": low_bit,
        "load_seconds": round(seen.load_seconds, 3) if ran else None,
        "ran": ran,
        "memory": memory and memory.model_dump(mode="json"),
        "selftest": _SELFTEST,
        # what was accepted here is accepted there: small shapes scatter more than whole runs do
        "selftest_db": min(
            limit_db(oracle["smallest_sqnr_db"], job.dtype), seen.smallest - _ENGINE_LOSS_DB
        ),
    }
    judged = smallest
    if not ran:
        judged = {"first": first, **unseen}
        document["selftest_db"] = min(
            limit_db(db, job.dtype)
            for db in (oracle["sqnr_db"], *oracle["unseen_sqnr_db"].values())
        )
    save_calls(judged, out / _SELFTEST)
    (out / "built.json").write_text(json.dumps(document), "utf-8")


_SELFTEST = "selftest.safetensors"
"""Calls that the engine is judged on where it is installed, or first runs."""


_RECORDED = "a recorded call"


@dataclass(frozen=True)
class _Seen:
    """An engine's SQNR against fp32 on recorded calls (all of them, the first), on each at a size
    that was never traced, and on the smallest ones; `load_seconds` from the start of opening
    it to its first outputs.
    """

    load_seconds: float
    total: float
    first: float
    unseen: dict[str, float]
    smallest: float


def _seen(
    engine: Engine,
    start: float,
    calls: Mapping[str, Call],
    unseen: Mapping[str, Call],
    smallest: Mapping[str, Call],
    steps: Steps,
) -> _Seen:
    """One size after the other: where an engine compiles a size when it comes, once each."""
    first = next(iter(calls.values()))
    engine(first.feeds(engine.signature))
    return _Seen(
        load_seconds=time.monotonic() - start,
        first=engine_db(engine, [first]),
        total=engine_db(engine, steps.counting(calls.values())),
        unseen={name: engine_db(engine, [call]) for name, call in steps.counting(unseen.items())},
        smallest=engine_db(engine, smallest.values()),
    )


def opened(job: Job, built: Built, out: Path, signature: Signature | None = None) -> Engine:
    """The engine in `out`, or a form of it with a `signature` of its own; not yet open."""
    return engine_class(job.backend)(
        {role: bytearray((out / name).read_bytes()) for role, name in built.files.items()},
        signature=signature or job.signature,
        properties=built.properties,
        threads=psutil.cpu_count(logical=False) or 1,
    )


def opened_proof(
    job: Job, prepared: Path, out: Path, form: str = "", signature: Signature | None = None
) -> Engine:
    """The graph that the engine, or its `form`, is built from, on ONNX Runtime: what it computes is
    proved where the engine can't run. `out` is where its files are for a moment.
    """
    from runners.engines.onnxruntime import ACCURACY, OnnxRuntimeEngine

    with TemporaryDirectory(dir=out) as private:
        files = builder(job.backend).prove(prepared, Path(private), job.how, form)
        return OnnxRuntimeEngine(
            {role: (Path(private) / name).read_bytes() for role, name in files.items()},
            signature=signature or job.signature,
            properties={"weights_location": files["weights"], ACCURACY: "1"},
            threads=psutil.cpu_count(logical=False) or 1,
        )


def _forms(
    job: Job,
    prepared: Path,
    out: Path,
    calls: Mapping[str, Call],
    alone: Mapping[str, float],
    *,
    ran: bool,
) -> dict[str, dict[str, Any]]:
    """Every form but a VAE's parts, built and checked with nothing in its further inputs: as good
    as the plain engine `alone` on the same calls. Low-rank inputs are of another rank in each call,
    of 0 in the first: engines leave out what has none.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, signature in prepared_forms(prepared).items():
        if name in PARTS:
            continue
        built = builder(job.backend).build_form(prepared, out, job.how, name)
        with (
            opened(job, built, out, signature)
            if ran
            else opened_proof(job, prepared, out, name, signature)
        ) as engine:
            for free, (where, call) in enumerate(calls.items()):
                got = engine(neutral_feeds(call, job.signature, signature, free=free))
                db = worst_sqnr_db([(call.outputs, [got[s.name] for s in signature.outputs])])
                _require(job, f"{where} with its inputs for {name}", db, alone[where])
        found[name] = {
            "files": built.files,
            "signature": signature.model_dump(mode="json"),
            "properties": built.properties,
            "memory": None,
        }
    return found


def _require_low_bits(job: Job, found: int | None) -> None:
    """Raise BuildError where fewer layers run in 8 bits or less than the policy means to."""
    if found is not None and found < job.low_bit_kernels:
        raise BuildError(
            f"{job.low_bit_kernels} layers of {job.spec.name} should run in low bits on "
            f"{job.backend}, and only {found} do: report the model, or compile with --quant none."
        )


def engine_db(engine: Engine, calls: Iterable[Call]) -> float:
    """The engine's SQNR against the calls' fp32 outputs: that of the worst output."""
    names = [spec.name for spec in engine.signature.outputs]
    return worst_sqnr_db((call.outputs, _outputs(engine, call, names)) for call in calls)


def _outputs(engine: Engine, call: Call, names: list[str]) -> list[Any]:
    found = engine(call.feeds(engine.signature))
    return [found[name] for name in names]


def _require(job: Job, where: str, db: float, oracle_db: float) -> None:
    limit = limit_db(oracle_db, job.dtype)
    if db < limit:
        raise ParityError(
            f"The {job.backend} engine of {job.spec.name} reaches {db:.1f} dB SQNR on {where}, and "
            f"{limit:.1f} dB are needed (its oracle reaches {oracle_db:.1f} dB): compile with "
            "--dtype fp32 or another --backend, and report the model."
        )
