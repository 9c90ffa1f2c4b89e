"""Whether a plan fits this machine, asked before any work."""

from __future__ import annotations

from pathlib import Path

from optimizer.plan import Plan
from profiles import hardware as facts
from profiles.errors import DiskFullError, OutOfMemory
from profiles.hardware import Hardware

__all__ = ["require_disk", "require_memory"]


def require_memory(plan: Plan, hardware: Hardware) -> None:
    """Refuse before any work what the builder would run out of memory with."""
    for job in plan.jobs:
        needed = job.build_memory_bytes
        if needed > hardware.ram_available_bytes:
            raise OutOfMemory(
                f"Building {job.spec.name} takes about {needed / 2**30:.1f} GiB and "
                f"{hardware.ram_available_bytes / 2**30:.1f} are free: close other programs, use "
                "--quant int8, or build on a machine with more memory (the cards needn't be there)."
            )


def require_disk(plan: Plan, out: Path, cache: Path) -> None:
    """Refuse before any work when the disk can't hold what will be written.

    The store keeps every component once as exported (fp32 at most) and once built.
    """
    engines = sum(job.bundle_bytes for job in plan.jobs)
    exported = sum(4 * job.parameters for job in plan.jobs)
    for folder, needed in ((cache, engines + exported), (out.absolute().parent, engines)):
        free = facts.free_disk_bytes(folder)
        if free < needed:
            raise DiskFullError(
                f"{folder} needs {needed / 2**30:.1f} GiB free and has {free / 2**30:.1f}: free "
                "some space, or set KILN_CACHE and -o to folders on another disk."
            )
