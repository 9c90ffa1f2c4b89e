"""A bundle of a few kilobytes whose engines nobody can open: for what never opens one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from runners.bundle import DIGEST_NAME, MANIFEST_NAME, digest_line
from runners.manifest import SCHEMA, ComponentEntry, FileEntry, Manifest, ModelEntry
from runners.mark import mark_bundle
from runners.signature import Signature

__all__ = ["toy_bundle"]

_ROLES = {
    "text_encoder": "text_encoder",
    "unet": "denoiser",
    "vae_decoder": "vae_decoder",
    "vae_encoder": "vae_encoder",
}


def toy_bundle(folder: Path, *, size: int = 1000, seed: int = 0, **fields: Any) -> Path:
    """Write a bundle that `open_bundle` accepts; `size` bytes an engine, `fields` of the manifest.

    It carries this machine's local mark: remove `local.mark` for one that came from elsewhere.
    Another seed gives other bytes in the denoiser's engine only.
    """
    files = {f"{name}/component.json": b"{}" for name in _ROLES}
    for name in _ROLES:
        block = hashlib.sha256(f"{name} {seed if name == 'unet' else 0}".encode()).digest()
        files[f"{name}/weights.bin"] = (block * (size // len(block) + 1))[:size]
    files["scheduler/scheduler_config.json"] = b'{"_class_name": "DDIMScheduler"}'
    files["tokenizer/vocab.json"] = b"{}"
    for name, raw in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    given = {
        "schema_version": SCHEMA,
        "kiln": "0.1.0",
        "key": hashlib.sha256(str(seed).encode()).hexdigest(),
        "model": ModelEntry(
            name="toy",
            revision=None,
            digest=hashlib.sha256(b"toy").hexdigest(),
            family="sd1",
            pipeline_class="StableDiffusionPipeline",
        ),
        "native_size": 64,
        "size_step": 8,
        "defaults": {},
        "recipe": {"size_min": 32, "size_max": 128, "batch": 2, "quant": "int8"},
        "policies": {},
        "components": tuple(_component(name, role, size) for name, role in _ROLES.items()),
        "files": {
            name: FileEntry(size=len(raw), sha256=hashlib.sha256(raw).hexdigest())
            for name, raw in files.items()
        },
        "tools": {"openvino": "2026.4.1"},
        "hardware": {},
        "speed": None,
    }
    manifest = Manifest.model_validate({**given, **fields})
    raw = json.dumps(manifest.model_dump(mode="json")).encode()
    (folder / MANIFEST_NAME).write_bytes(raw)
    (folder / DIGEST_NAME).write_bytes(digest_line(raw))
    mark_bundle(folder)
    return folder


def _component(name: str, role: str, size: int) -> ComponentEntry:
    return ComponentEntry.model_validate(
        {
            "name": name,
            "role": role,
            "wrapper": "unet",
            "backend": "openvino",
            "quant": "none",
            "dtype": "fp32",
            "signature": Signature(inputs=(), outputs=(), dims=()),
            "files": {"weights": f"{name}/weights.bin"},
            "config": f"{name}/component.json",
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
        }
    )
