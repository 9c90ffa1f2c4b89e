"""What others published of their own machines: beside what is measured here, never among it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["PUBLISHED", "Published", "published"]

_FAL = "github.com/fal-ai/stable-diffusion-benchmarks, README at 0490f69"
_FAL_ON = "A100 80G SXM, fp16, 50 steps, end to end"


@dataclass(frozen=True)
class Published:
    """One figure of somebody else's: seconds a picture."""

    model: str
    way: str
    seconds: float
    hardware: str
    """Card, precision, steps: figures of two sources can't be compared."""
    source: str


PUBLISHED = (
    Published("SD1.5 512x512", "diffusers, torch 2.1, SDPA", 1.591, _FAL_ON, _FAL),
    Published("SD1.5 512x512", "the same, torch.compile", 1.352, _FAL_ON, _FAL),
    Published("SD1.5 512x512", "the same, channels last", 1.066, _FAL_ON, _FAL),
    Published("SD1.5 512x512", "OneFlow", 0.951, _FAL_ON, _FAL),
    Published("SD1.5 512x512", "TensorRT 9.0, CUDA graphs, static", 0.819, _FAL_ON, _FAL),
    Published("SDXL 1024x1024", "diffusers, torch 2.1, SDPA", 5.933, _FAL_ON, _FAL),
    Published("SDXL 1024x1024", "the same, torch.compile", 5.246, _FAL_ON, _FAL),
    Published("SDXL 1024x1024", "the same, channels last", 5.132, _FAL_ON, _FAL),
    Published("SDXL 1024x1024", "OneFlow", 4.605, _FAL_ON, _FAL),
    Published("SDXL 1024x1024", "TensorRT 9.0, CUDA graphs, static", 4.102, _FAL_ON, _FAL),
    Published(
        "FLUX.1-dev 512x512",
        "diffusers",
        8.71,
        "L40S, 50 steps, end to end",
        "pruna.ai/blog/comparison-flux-torch-compile-tensor-rt-pruna (17 February 2025)",
    ),
)


def published() -> list[dict[str, Any]]:
    """The figures as data."""
    return [asdict(one) for one in PUBLISHED]
