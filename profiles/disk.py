"""The disk that holds a folder: what is free on it, and whether it is an NVMe one."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from profiles.hardware import free_disk_bytes

__all__ = ["Disk", "is_nvme", "read_disk"]

_BLOCKS = Path("/sys/dev/block")


class Disk(BaseModel):
    """One disk, when it was read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    free_bytes: int
    nvme: bool | None
    """None where the system doesn't tell: inside containers, on virtual disks, off Linux."""


def read_disk(where: str | Path) -> Disk:
    """The disk that holds `where`, or would hold it once it is made."""
    path = Path(where).absolute()
    while not path.exists():
        path = path.parent
    nvme = None
    if platform.system() == "Linux":
        device = path.stat().st_dev
        nvme = is_nvme(_BLOCKS / f"{os.major(device)}:{os.minor(device)}")
    return Disk(free_bytes=free_disk_bytes(path), nvme=nvme)


def is_nvme(block: Path) -> bool | None:
    """Whether a block device of Linux's /sys/dev/block lies on NVMe disks only, if it tells.

    Volumes of the device mapper are what they lie on; SCSI and ATA disks ("sd") aren't NVMe.
    """
    if not block.exists():
        return None
    device = block.resolve()
    under = sorted((device / "slaves").iterdir()) if (device / "slaves").is_dir() else []
    if under:
        found = {is_nvme(one) for one in under}
        return None if None in found else found == {True}
    if device.name.startswith("nvme"):
        return True
    return False if device.name.startswith("sd") else None
