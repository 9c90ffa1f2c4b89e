"""An engine that was built elsewhere is judged where it first runs: recorded calls, once.

The result is a file beside the bundle (in the user's cache where that can't be written), one entry
a component and card, so that the next run trusts it and the bundle itself stays as it was signed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import safetensors.numpy

from profiles.errors import SelfTestError
from runners.bundle import Bundle
from runners.engines.base import Array, Engine
from runners.manifest import ComponentEntry

__all__ = ["check_calls", "require_selftest", "result_paths", "state_of"]


def require_selftest(bundle: Bundle, entry: ComponentEntry, engine: Engine, machine: str) -> None:
    """Run the component's recorded calls on `engine` unless they have passed on `machine` before.

    Raises SelfTestError with both numbers where a call's SQNR against fp32 is below the manifest's.
    """
    if entry.selftest is None or entry.selftest_db is None:
        return
    known = _results(bundle)
    key = f"{entry.name} on {machine}"
    if key in known:
        return
    found = check_calls(bundle, entry, engine)
    if min(found.values()) < entry.selftest_db:
        raise SelfTestError(
            f"The engine of {entry.name} gives {min(found.values()):.1f} dB SQNR to fp32 on "
            f"{machine} where {entry.selftest_db:.1f} dB are needed: don't use it; update the "
            "driver, or compile the bundle again."
        )
    _write(bundle, {**known, key: {"sqnr_db": found, "needed_db": entry.selftest_db}})


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


def _results(bundle: Bundle) -> dict[str, Any]:
    for path in result_paths(bundle):
        try:
            document = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(document, dict) and document.get("bundle") == state_of(bundle):
            passed = document.get("passed")
            return passed if isinstance(passed, dict) else {}
    return {}


def _write(bundle: Bundle, passed: dict[str, Any]) -> None:
    text = json.dumps({"bundle": state_of(bundle), "passed": passed}, indent=1)
    for path in result_paths(bundle):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f"{path.name}.{os.getpid()}")
            fresh.write_text(text, "utf-8")
            fresh.replace(path)
        except OSError:
            continue
        return
