"""Facts read from the live machine: CPU instruction sets and cores, memory, free disk.

`profiles.facts` adds what only a whole report of a machine needs: cards, libraries, the disk.
"""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = [
    "BF16",
    "INT8_DOT",
    "ISA",
    "Cpu",
    "Hardware",
    "detect",
    "free_disk_bytes",
    "parse_cpuinfo",
    "read_cpu",
    "read_glibc",
    "read_machine",
    "read_memory",
]

ISA = (
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "avx",
    "avx2",
    "avx512_bf16",
    "avx512_vnni",
    "avx512bw",
    "avx512f",
    "avx_vnni",
    "bf16",
    "i8mm",
    "sse4_2",
)
"""The instruction sets that matter here, by Linux's names for x86-64 and AArch64."""

INT8_DOT = ("amx_int8", "asimddp", "avx512_vnni", "avx_vnni", "i8mm")
"""Any of them runs int8 dot products in one instruction."""
BF16 = ("amx_bf16", "avx512_bf16", "bf16")
"""Any of them runs bf16 products in hardware."""
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cpu(_Facts):
    """One processor."""

    name: str
    """As the processor calls itself."""
    cores: int
    """Physical cores that this process may use."""
    isa: tuple[str, ...]
    """Those of `ISA` that it has, sorted."""

    @property
    def has_int8_dot(self) -> bool:
        """Whether int8 dot products run in one instruction (VNNI, AMX, Arm's dot product)."""
        return not set(INT8_DOT).isdisjoint(self.isa)

    @property
    def has_bf16(self) -> bool:
        """Whether bf16 products run in hardware."""
        return not set(BF16).isdisjoint(self.isa)


class Hardware(_Facts):
    """What one machine is; equal for identical machines, free memory aside."""

    schema_version: Literal[1] = 1
    os: str
    """"Linux", "Windows" or "Darwin"."""
    machine: str
    """"x86_64" or "aarch64", the same name on every system."""
    cpu: Cpu
    ram_bytes: int
    """What the machine or, where it is smaller, the container has."""
    ram_available_bytes: int
    """What could be allocated without swapping when it was read."""


def detect() -> Hardware:
    """Read the facts of this machine; takes a few milliseconds and starts no process on Linux."""
    total, available = read_memory()
    return Hardware(
        os=platform.system(),
        machine=read_machine(),
        cpu=read_cpu(),
        ram_bytes=total,
        ram_available_bytes=available,
    )


def read_machine() -> str:
    """The kind of processor, by one name on every system."""
    machine = platform.machine()
    return _MACHINES.get(machine.lower(), machine)


def read_glibc() -> str | None:
    """glibc's version; None where the system has another C library."""
    name, number = platform.libc_ver()
    return number if name == "glibc" else None


def read_memory() -> tuple[int, int]:
    """Bytes in all and bytes that could be allocated now, of the container where it has fewer."""
    import psutil

    memory = psutil.virtual_memory()
    limit, used = _container_memory()
    total = min(memory.total, limit or memory.total)
    available = min(memory.available, total - used if limit else memory.available)
    return total, max(0, available)


def free_disk_bytes(path: str | Path) -> int:
    """Return the free bytes of the disk that holds `path`, or that would hold it once made."""
    nearest = Path(path).absolute()
    while not nearest.exists():
        nearest = nearest.parent
    return shutil.disk_usage(nearest).free


def read_cpu() -> Cpu:
    """The processor, by what the kernel lists or, where it lists nothing, by its own word."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name, flags = parse_cpuinfo(cpuinfo.read_text(encoding="utf-8", errors="replace"))
    else:
        name, flags = _ask_archspec()
    isa = tuple(sorted(flags.intersection(ISA)))
    return Cpu(name=name or platform.processor() or "unknown", cores=_usable_cores(), isa=isa)


def parse_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    """Return name and flags of the first processor in the text of Linux's /proc/cpuinfo.

    AArch64 kernels say "Features" and give no name.
    """
    name, flags = "", frozenset[str]()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and not name:
            name = value.strip()
        elif key.strip() in ("flags", "Features") and not flags:
            flags = frozenset(value.split())
    return name, flags


def _ask_archspec() -> tuple[str, frozenset[str]]:
    """Ask the processor itself (Windows) or sysctl (macOS)."""
    import archspec.cpu
    import archspec.cpu.detect

    features = {*archspec.cpu.detect.detected_info().features, *archspec.cpu.host().features}
    return str(archspec.cpu.brand_string() or ""), frozenset(features)


def _usable_cores() -> int:
    """Physical cores, or fewer where the process is bound to fewer logical ones."""
    import psutil

    logical = psutil.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    process = psutil.Process()
    allowed = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else logical
    return max(1, min(physical, allowed))


def _container_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int]:
    """Return limit and use in bytes of the control group (version 2) that we run in, if any."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = (root / "memory.current").read_text().strip()
    except OSError:
        return None, 0
    return (int(limit), int(used)) if limit.isdecimal() and used.isdecimal() else (None, 0)
