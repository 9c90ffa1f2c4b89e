"""Twenty kinds of bundles, by what their engines require; nothing of them is compiled."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from optimizer.backends import BACKENDS
from optimizer.requiring import requires_of
from runners.manifest import ComponentEntry, FileEntry, Manifest, ModelEntry
from runners.requires import Observed, Requires
from runners.signature import Signature
from tests.toy_bundle import OBSERVED

__all__ = ["KINDS", "Kind", "manifest_of"]

_BUILT_BY = {
    "openvino": "2026.4.1",
    "onnxruntime": "1.32.0",
    "tensorrt-rtx": "1.7.1.116",
    "tensorrt": "11.4.0.12",
    "eager": "2.13.0+cpu",
}
_GIB = 1 << 30


@dataclass(frozen=True)
class Kind:
    """One kind of bundle."""

    backend: str
    dtype: str = "fp32"
    format_: str | None = None
    """Of its quantized layers."""
    cards: tuple[str, ...] = ()
    gib: float = 1.0
    streams: bool = False
    on: tuple[str, str] = ("Linux", "x86_64")
    version: str | None = None


KINDS = {
    "openvino-fp32": Kind("openvino"),
    "openvino-bf16": Kind("openvino", "bf16"),
    "openvino-int8": Kind("openvino", "fp32", "w8a8"),
    "openvino-int8-bf16": Kind("openvino", "bf16", "w8a8", gib=0.6),
    "openvino-int4": Kind("openvino", "fp32", "w4a16", gib=0.4),
    "openvino-12gb": Kind("openvino", gib=12),
    "openvino-older": Kind("openvino", version="2025.1.0"),
    "openvino-arm": Kind("openvino", on=("Linux", "aarch64")),
    "onnxruntime-fp32": Kind("onnxruntime"),
    "onnxruntime-int8": Kind("onnxruntime", "fp32", "w8a8"),
    "tensorrt-ampere": Kind("tensorrt", "fp16", cards=("8.6",)),
    "eager-fp32": Kind("eager"),
    "eager-nf4-24gb": Kind("eager", "fp32", "nf4", gib=24),
    "rtx-ampere-ada-blackwell": Kind("tensorrt-rtx", "fp16", "w8a8", ("8.6", "8.9", "12.0")),
    "rtx-portable": Kind("tensorrt-rtx", "fp16"),
    "rtx-turing": Kind("tensorrt-rtx", "fp16", cards=("7.5",)),
    "rtx-nvfp4": Kind("tensorrt-rtx", "bf16", "nvfp4", ("12.0",), gib=7),
    "rtx-streamed-18gb": Kind("tensorrt-rtx", "fp16", None, ("8.6", "8.9"), 18, streams=True),
    "rtx-11gb": Kind("tensorrt-rtx", "bf16", None, ("8.6", "8.9", "12.0", "12.1"), 11),
    "tensorrt-hopper": Kind("tensorrt", "bf16", cards=("9.0",)),
}


def manifest_of(kind: Kind) -> Manifest:
    """The manifest of a bundle whose denoiser, its only engine, is of this kind."""
    requires = _requires(kind)
    sha256 = hashlib.sha256(b"").hexdigest()
    fields: dict[str, Any] = {
        "schema_version": 4,
        "kiln": "0.1.0",
        "key": sha256,
        "model": ModelEntry(
            name="m", revision=None, digest=sha256, family="sd1", pipeline_class="x"
        ),
        "native_size": 512,
        "size_step": 8,
        "defaults": {},
        "recipe": {
            "size_min": 256,
            "size_max": 1024,
            "batch": 4,
            "target": ",".join(kind.cards) or None,
        },
        "policies": {},
        "components": (_denoiser(kind, requires),),
        "files": {"unet/component.json": FileEntry(size=0, sha256=sha256)},
        "tools": {},
        "observed": Observed(host=OBSERVED.host, build_seconds=300.0),
        "speed": None,
    }
    return Manifest.model_validate(fields)


def _requires(kind: Kind) -> Requires:
    """By the compiler's own rules, from as much of a job as they look at."""
    job: Any = SimpleNamespace(
        backend=kind.backend,
        dtype=kind.dtype,
        layers={"x": SimpleNamespace(format=kind.format_)} if kind.format_ else {},
        capabilities=kind.cards,
        weight_streaming=kind.streams,
    )
    return requires_of(
        job,
        built_on=kind.on,
        version=kind.version or _BUILT_BY[kind.backend],
        memory_bytes=int(kind.gib * _GIB),
    )


def _denoiser(kind: Kind, requires: Requires) -> ComponentEntry:
    size = requires.memory_bytes
    fields: dict[str, Any] = {
        "name": "unet",
        "role": "denoiser",
        "wrapper": "unet",
        "backend": BACKENDS[kind.backend].name,
        "quant": {"w8a8": "int8", None: "none"}.get(kind.format_, kind.format_),
        "dtype": kind.dtype,
        "signature": Signature(inputs=(), outputs=()),
        "files": {},
        "config": "unet/component.json",
        "properties": {},
        "parameters": size // 4,
        "fp32_bytes": size,
        "engine_bytes": size,
        "layers_quantized": 0,
        "layers_total": 0,
        "layers_low_bit": None,
        "sqnr_db": None,
        "oracle_sqnr_db": None,
        "unseen_sqnr_db": {},
        "load_seconds": None,
        "requires": requires,
    }
    return ComponentEntry.model_validate(fields)
