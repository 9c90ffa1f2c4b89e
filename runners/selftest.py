"""A bundle's recorded calls, and what is known of them: which engines passed where, what failed.

Engines that didn't run where they were built are judged when they first open; `kiln selftest`
judges all of them and the recorded picture in a process of its own. Results lie in a file beside
the bundle (in the user's cache where that can't be written), so that the bundle itself stays as it
was signed. What passed is kept by component and card, failures by the machine as it was: another
driver or library makes it another machine, which may try again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import safetensors.numpy

from profiles.errors import SelfTestError
from profiles.facts import Facts, read_facts
from runners.bundle import Bundle
from runners.engines.base import Array, Engine
from runners.manifest import ComponentEntry, Manifest

__all__ = [
    "check_calls",
    "facts_for",
    "require_passed",
    "require_selftest",
    "result_paths",
    "state_of",
    "store_outcome",
]


def require_selftest(bundle: Bundle, entry: ComponentEntry, engine: Engine, machine: str) -> None:
    """Run the component's recorded calls on `engine` unless they have passed on `machine` before.

    Raises SelfTestError with both numbers where a call's SQNR against fp32 is below the manifest's.
    """
    if entry.selftest is None or entry.selftest_db is None:
        return
    known = _results(bundle)
    key = f"{entry.name} on {machine}"
    if key in known["passed"]:
        return
    found = check_calls(bundle, entry, engine)
    if min(found.values()) < entry.selftest_db:
        raise SelfTestError(
            f"The engine of {entry.name} gives {min(found.values()):.1f} dB SQNR to fp32 on "
            f"{machine} where {entry.selftest_db:.1f} dB are needed: don't use it; update the "
            "driver, or compile the bundle again."
        )
    known["passed"][key] = {"sqnr_db": found, "needed_db": entry.selftest_db}
    _write(bundle, known)


def facts_for(manifest: Manifest) -> Facts:
    """This machine's facts, as far as the bundle's engines are concerned: cards only for those."""
    return read_facts(ask_driver=manifest.on_card)


def require_passed(bundle: Bundle, facts: Facts) -> None:
    """Raise SelfTestError where the bundle's last self-test on this machine failed."""
    if (sentence := _results(bundle)["failed"].get(_machine_key(facts))) is not None:
        raise SelfTestError(
            f"The self-test of {bundle.path} failed here, so it isn't run; {sentence} "
            f"`kiln selftest {bundle.path}` tries again."
        )


def store_outcome(
    bundle: Bundle, facts: Facts, *, passed: Mapping[str, Any], failure: str | None
) -> None:
    """Keep what a self-test found: results by "component on machine", and the sentence of what
    failed, None where nothing did.
    """
    known = _results(bundle)
    known["failed"].pop(_machine_key(facts), None)
    if failure is None:
        known["passed"].update(passed)
    else:
        known["failed"][_machine_key(facts)] = failure
    _write(bundle, known)


def _machine_key(facts: Facts) -> str:
    """Of everything on which an engine's numbers can depend."""
    cards = [card.name for card in facts.cards]
    parts = [facts.os, facts.machine, facts.cpu.model_dump(), cards, facts.driver, facts.libraries]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def check_calls(bundle: Bundle, entry: ComponentEntry, engine: Engine) -> dict[str, float]:
    """Name of a recorded call -> the SQNR against fp32 of the engine's worst output, in dB."""
    found = {}
    for name, (feeds, wanted) in _calls(bundle, entry).items():
        outputs = engine(feeds)
        found[name] = round(min(_sqnr_db(wanted[key], outputs[key]) for key in wanted), 2)
    return found


def _calls(
    bundle: Bundle, entry: ComponentEntry
) -> dict[str, tuple[dict[str, Array], dict[str, Array]]]:
    """Name -> feeds and the outputs of fp32, as optimizer.calls wrote them."""
    assert entry.selftest is not None
    tensors = safetensors.numpy.load(bytes(bundle.file(entry.selftest)))
    names = dict.fromkeys(key.split("/")[0] for key in tensors)
    return {
        name: (
            {spec.name: tensors[f"{name}/i/{k}"] for k, spec in enumerate(entry.signature.inputs)},
            {spec.name: tensors[f"{name}/o/{k}"] for k, spec in enumerate(entry.signature.outputs)},
        )
        for name in sorted(names)
    }


def _sqnr_db(wanted: Array, got: Array) -> float:
    reference, output = wanted.astype(np.float64), got.astype(np.float64)
    signal, error = float(np.square(reference).sum()), float(np.square(reference - output).sum())
    if not math.isfinite(error):
        return -200.0
    return 200.0 if error == 0 else 10 * math.log10(max(signal, 1e-300) / error)


def result_paths(bundle: Bundle) -> tuple[Path, Path]:
    """Where results may lie: beside the bundle, or in the user's cache."""
    path = bundle.path.absolute()
    root = Path(os.environ.get("KILN_CACHE") or platformdirs.user_cache_path("kiln"))
    return (
        path.parent / f"{path.name}.selftest.json",
        root / "selftest" / f"{bundle.manifest.key}.json",
    )


def state_of(bundle: Bundle) -> str:
    """What a result is of: another build under the same name has to pass again."""
    files = {name: entry.sha256 for name, entry in bundle.manifest.files.items()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _results(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """{"passed": ..., "failed": ...} of the bundle as it is; empty where nothing is known."""
    for path in result_paths(bundle):
        try:
            document = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(document, dict) and document.get("bundle") == state_of(bundle):
            kept = (document.get("passed"), document.get("failed"))
            return {
                name: found if isinstance(found, dict) else {}
                for name, found in zip(("passed", "failed"), kept, strict=True)
            }
    return {"passed": {}, "failed": {}}


def _write(bundle: Bundle, known: Mapping[str, Any]) -> None:
    text = json.dumps({"bundle": state_of(bundle), **known}, indent=1)
    for path in result_paths(bundle):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f"{path.name}.{os.getpid()}")
            fresh.write_text(text, "utf-8")
            fresh.replace(path)
        except OSError:
            continue
        return
