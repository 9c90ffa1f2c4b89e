"""Reads where and with what a measurement runs: machine, load, versions."""

from __future__ import annotations

import os
import platform
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version

from benchmarks.comparison import Activity, Conditions
from profiles.hardware import Hardware

__all__ = ["activity", "conditions", "load_average", "tool_versions"]

_TOOLS = (
    "kiln-diffusion",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt-rtx",
    "numpy",
    "scikit-image",
    "flip-evaluator",
    "bitsandbytes",
    "torchao",
)


def conditions(
    hardware: Hardware, *, date: datetime, before: Activity, after: Activity
) -> Conditions:
    """Put together what a report says of the machine."""
    return Conditions(
        date=date,
        cpu=hardware.cpu.name,
        isa=hardware.cpu.isa,
        cores=hardware.cpu.cores,
        ram_bytes=hardware.ram_bytes,
        os=f"{hardware.os} {platform.release()} {hardware.machine}",
        before=before,
        after=after,
        versions=tool_versions(),
    )


def activity() -> Activity:
    """Watch the machine for a second."""
    import psutil

    share = psutil.cpu_percent(interval=1.0) / 100
    return Activity(cpu_share=share, load_average=load_average())


def load_average() -> float | None:
    """The load average over one minute; None on systems that have none (Windows)."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def tool_versions() -> dict[str, str]:
    """Versions of Python and of the packages, those that are installed, that figures depend on."""
    found = {"python": platform.python_version()}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
