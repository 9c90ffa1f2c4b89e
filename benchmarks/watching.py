"""A command, watched while it runs."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping

__all__ = ["watched"]

_EVERY_SECONDS = 0.1


def watched(command: list[str], environment: Mapping[str, str]) -> tuple[float, int]:
    """Seconds, and the largest resident size of the process and its children together.

    Raises CalledProcessError where it fails.
    """
    import psutil

    start, peak = time.monotonic(), 0
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    process = psutil.Process(child.pid)
    while child.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in family))
        except psutil.Error:
            pass
        time.sleep(_EVERY_SECONDS)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return time.monotonic() - start, peak
