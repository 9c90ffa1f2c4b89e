"""What this process holds of the machine's memory, now and at most, in resident bytes."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["peak_bytes", "reset_peak", "resident_bytes", "trim"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""proc(5): writing 5 sets the peak to what is resident now."""


def resident_bytes() -> int:
    """Resident now, shared pages of libraries and mapped files included."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most that was resident since `reset_peak`, or since the start where it can't be reset;
    what is resident now where the system doesn't tell.
    """
    with suppress(OSError):
        for line in _STATUS.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resident_bytes()


def reset_peak() -> None:
    """Count the peak anew, where the system can (Linux); elsewhere nothing happens."""
    with suppress(OSError):
        _CLEAR.write_text(_RESET_PEAK, "utf-8")


def trim() -> None:
    """Give back what was freed: glibc keeps freed memory for later, other systems don't ask."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than glibc has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
