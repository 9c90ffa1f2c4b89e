"""How fast a bundle installs against a plain copy, and what memory packing one takes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.conditions import load_average
from benchmarks.watching import watched
from runners.console import Console
from runners.manifest import SCHEMA
from runners.manifest_file import DIGEST_NAME, MANIFEST_NAME, digest_line

__all__ = ["generate_bundle", "lines", "measure"]

_INSTALL_BYTES, _PACK_BYTES, _ROUNDS = 10**9, 2 * 10**9, 9

_REQUIRES = {
    "systems": [],
    "machines": [],
    "only_there": False,
    "glibc": None,
    "isa": [],
    "build_isa": [],
    "fast_isa": [],
    "capabilities": None,
    "buildable": [],
    "driver": None,
    "library": {"distribution": "openvino", "version": "0", "rule": "minimum"},
    "memory_bytes": 0,
    "streams": False,
}
_OBSERVED = {
    "host": {
        "os": "",
        "machine": "",
        "cpu": {"name": "", "cores": 1, "isa": []},
        "ram_bytes": 0,
        "glibc": None,
    },
    "build_seconds": 0,
}
_CHUNK = 1 << 20
_ROLES = ("text_encoder", "denoiser", "vae_decoder", "vae_encoder")


def generate_bundle(folder: Path, size: int) -> None:
    """A bundle whose manifest is right and whose engines are `size` random bytes, half in one."""
    files = {
        "scheduler/scheduler_config.json": _write(folder, "scheduler/scheduler_config.json", 2)
    }
    for role in _ROLES:
        files[f"{role}/component.json"] = _write(folder, f"{role}/component.json", 2)
        share = size // 2 if role == "denoiser" else size // 6
        files[f"{role}/weights.bin"] = _write(folder, f"{role}/weights.bin", share)
    document = {
        "schema_version": SCHEMA,
        "kiln": "0",
        "key": hashlib.sha256(str(size).encode()).hexdigest(),
        "model": {
            "name": "generated",
            "revision": None,
            "digest": "0" * 64,
            "family": "none",
            "pipeline_class": "none",
        },
        "native_size": 64,
        "size_step": 8,
        "defaults": {},
        "recipe": {"size_min": 64, "size_max": 64, "batch": 1},
        "policies": {},
        "components": [_component(role) for role in _ROLES],
        "files": files,
        "tools": {},
        "observed": _OBSERVED,
        "speed": None,
    }
    raw = json.dumps(document).encode()
    (folder / MANIFEST_NAME).write_bytes(raw)
    (folder / DIGEST_NAME).write_bytes(digest_line(raw))


def _component(role: str) -> dict[str, object]:
    numbers = ("parameters", "fp32_bytes", "engine_bytes", "layers_quantized", "layers_total")
    unknown = ("layers_low_bit", "sqnr_db", "oracle_sqnr_db", "load_seconds")
    return {
        "name": role,
        "role": role,
        "wrapper": "none",
        "backend": "openvino",
        "quant": "none",
        "dtype": "fp32",
        "signature": {"inputs": [], "outputs": [], "dims": []},
        "files": {"weights": f"{role}/weights.bin"},
        "config": f"{role}/component.json",
        "properties": {},
        "requires": _REQUIRES,
        "unseen_sqnr_db": {},
        **dict.fromkeys(numbers, 0),
        **dict.fromkeys(unknown),
    }


def _write(folder: Path, name: str, size: int) -> dict[str, object]:
    """Write `size` bytes that nothing compresses, a chunk in memory at a time."""
    noise, digest = random.Random(name), hashlib.sha256()
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        for start in range(0, size, _CHUNK):
            chunk = b"{}" if size == 2 else noise.randbytes(min(_CHUNK, size - start))
            digest.update(chunk)
            stream.write(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def measure(console: Console, _out: Path) -> dict[str, Any]:
    """Install a bundle and copy it, in turn, on the disk of temporary files; pack another."""
    from runners.keys import make_keys

    with tempfile.TemporaryDirectory() as private:
        folder = Path(private)
        make_keys(folder / "key")
        with console.stage("Generate a bundle"):
            generate_bundle(folder / "bundle", _PACK_BYTES)
        command = [sys.executable, "-m", "runners.cli", "pack", str(folder / "bundle")]
        options = ["-o", str(folder / "out"), "--key", str(folder / "key")]
        with console.stage(f"Pack {_PACK_BYTES / 1e9:.1f} GB"):
            seconds, peak = watched([*command, *options], dict(os.environ))
        packed = {
            "pack_bytes": _PACK_BYTES,
            "pack_seconds": round(seconds, 2),
            "pack_peak_rss_bytes": peak,
        }
        shutil.rmtree(folder / "bundle")
        shutil.rmtree(folder / "out")
        generate_bundle(folder / "bundle", _INSTALL_BYTES)
        with console.stage(f"Install {_INSTALL_BYTES / 1e9:.1f} GB and copy it", _ROUNDS) as stage:
            rows = []
            for _ in range(_ROUNDS):
                rows.append(_round(folder))
                stage.advance()
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return {
        **packed,
        "install_bytes": _INSTALL_BYTES,
        "rounds": _ROUNDS,
        "seconds": {name: round(value, 3) for name, value in medians.items()},
        "throughput_of_copy": round(medians["copy"] / medians["install"], 3),
        "throughput_of_flushed_copy": round(medians["flushed_copy"] / medians["install"], 3),
        "load_average_after": load_average(),
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """What `kiln bench` prints."""
    return [
        f"install: {found['throughput_of_copy']}x of a plain copy and sha256 "
        f"({found['throughput_of_flushed_copy']}x of one that is flushed to the disk); pack of "
        f"{found['pack_bytes'] / 1e9:.1f} GB: {found['pack_peak_rss_bytes'] / 1e6:.0f} MB"
    ]


def _round(folder: Path) -> dict[str, float]:
    """Seconds of an install from a signed folder, and of copies of it, each hashed afterwards."""
    from runners.installing import Request, install
    from runners.packing import pack_folder
    from runners.trust import load_trust

    signed, quiet = folder / "signed", Console()
    if not signed.exists():
        pack_folder(folder / "bundle", signed, quiet, key=folder / "key")
    request = Request(source=str(signed), root=folder / "root")
    trust = load_trust(folder / "key.pub")
    copy = folder / "copy"
    ways: list[tuple[str, Callable[[], object], Path]] = [
        ("copy", lambda: _copy(signed, copy, flush=None), copy),
        ("install", lambda: install(request, trust, quiet), request.root),
        ("flushed_copy", lambda: _copy(signed, copy, flush=os.fsync), copy),
    ]
    random.shuffle(ways)  # what one leaves to the disk may hold up the next
    return {name: _timed(work, leaves) for name, work, leaves in ways}


def _timed(work: Callable[[], object], leaves: Path) -> float:
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    shutil.rmtree(leaves)
    return seconds


def _copy(source: Path, target: Path, *, flush: Callable[[int], None] | None) -> None:
    """Copy all files as `shutil` does, then hash the copies."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for path in target.rglob("*"):
        if path.is_file():
            with path.open("rb+") as stream:
                if flush is not None:
                    flush(stream.fileno())
                hashlib.file_digest(stream, "sha256")
