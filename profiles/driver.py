"""NVIDIA's driver and cards: by nvidia-ml-py where it is installed, else by nvidia-smi."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from pydantic import BaseModel, ConfigDict

__all__ = ["Card", "Driver", "parse_smi", "read_driver"]

_FIELDS = "name,compute_cap,memory.total,memory.free,driver_version"
_SECONDS = 10
"""How long nvidia-smi may take: a second where the driver has to be loaded first."""


class Card(BaseModel):
    """One NVIDIA card."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """As the driver calls it."""
    capability: str | None
    """Its compute capability, "8.6"; None where the driver doesn't say."""
    memory_bytes: int | None
    memory_free_bytes: int | None
    """When it was read."""


class Driver(BaseModel):
    """The driver and the cards that it sees, in its own order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    cuda: str | None
    """The newest version of CUDA that it runs."""
    cards: tuple[Card, ...]


def read_driver() -> Driver | None:
    """What the driver says; None where there is none.

    Raises OSError, with the driver's own words, where there is one and it doesn't answer.
    """
    if find_spec("pynvml") is not None:
        try:
            return _by_nvml(import_module("pynvml"))
        except OSError:
            pass  # nvidia-smi says more clearly what is wrong, or that there is no driver
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    cards = _printed(program, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")
    return parse_smi(cards, _printed(program))


def parse_smi(cards: str, banner: str) -> Driver | None:
    """What nvidia-smi printed: a line of `_FIELDS` a card, and its table, which names CUDA.

    None where there is no card. Raises OSError for lines that aren't such.
    """
    rows = [[part.strip() for part in line.split(",")] for line in cards.splitlines() if line]
    if not rows:
        return None
    if any(len(row) != len(_FIELDS.split(",")) for row in rows):
        raise OSError(f"nvidia-smi printed {cards.splitlines()[0]!r}")
    cuda = re.search(r"CUDA Version\s*:\s*([0-9]+\.[0-9]+)", banner)
    return Driver(
        version=rows[0][-1],
        cuda=cuda[1] if cuda else None,
        cards=tuple(
            Card(
                name=name,
                capability=capability if re.fullmatch(r"[0-9]+\.[0-9]", capability) else None,
                memory_bytes=_mib(total),
                memory_free_bytes=_mib(free),
            )
            for name, capability, total, free, _ in rows
        ),
    )


def _mib(text: str) -> int | None:
    return int(text) << 20 if text.isdecimal() else None  # "[N/A]" where memory is shared


def _printed(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.SubprocessError as error:
        raise OSError(f"nvidia-smi didn't answer in {_SECONDS} s") from error
    if done.returncode:
        words = (done.stdout.strip() or done.stderr.strip() or "no message").splitlines()[0]
        raise OSError(f"nvidia-smi says: {words}")
    return done.stdout


def _by_nvml(nvml: Any) -> Driver | None:
    """The same from the driver's own library; OSError where it isn't there or doesn't answer."""
    try:
        nvml.nvmlInit()
        try:
            handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
            cards = tuple(_card(nvml, handle) for handle in handles)
            cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
            version = str(nvml.nvmlSystemGetDriverVersion())
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise OSError(f"NVML says: {error}") from error
    named = f"{cuda // 1000}.{cuda % 1000 // 10}"
    return Driver(version=version, cuda=named, cards=cards) if cards else None


def _card(nvml: Any, handle: Any) -> Card:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Card(
        name=str(nvml.nvmlDeviceGetName(handle)),
        capability=f"{major}.{minor}",
        memory_bytes=int(memory.total),
        memory_free_bytes=int(memory.free),
    )
