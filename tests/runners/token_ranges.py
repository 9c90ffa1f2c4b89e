"""Eager pipelines that say, as a bundle's do, how many text tokens their denoiser takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from runners.signature import Dim, Signature, TensorSpec

__all__ = ["with_tokens"]


def with_tokens(pipeline: Any, axis: int | Dim) -> Any:
    """The pipeline as if its denoiser's engine took so many text tokens."""
    name = axis if isinstance(axis, int) else axis.name
    states = TensorSpec(name="encoder_hidden_states", dtype="float32", axes=("batch", name, 32))
    batch = Dim(name="batch", min=1, opt=2, max=2)
    dims = (batch,) if isinstance(axis, int) else (batch, axis)
    signature = Signature(inputs=(states,), outputs=(), dims=dims)
    entry = SimpleNamespace(signature=signature)
    manifest = SimpleNamespace(component=lambda role: {"denoiser": entry}[role])
    pipeline.kiln = SimpleNamespace(manifest=manifest)
    return pipeline
