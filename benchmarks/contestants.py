"""Who takes part in a comparison, and the process that each of them runs in.

A `Contestant` is data; a `Worker` is its child process (`benchmarks.compare_worker`), asked one
request at a time. The child inherits nothing but the environment and its three pipes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from benchmarks.baselines import Baseline
from profiles import errors

__all__ = ["REFERENCE", "Asked", "Contestant", "Worker"]

REFERENCE = "diffusers fp32"
"""The name of the plain pipeline's row, which every other row is measured against."""

_LOG_TAIL = 2000


@dataclass(frozen=True)
class Contestant:
    """One way to run the model."""

    name: str
    """The level's name, or `REFERENCE`."""
    kind: Literal["diffusers", "bundle"] | Baseline
    """The plain pipeline, a bundle, or the plain pipeline with its denoiser in another way."""
    path: Path
    """The diffusers folder or the bundle."""
    backend: str
    dtype: str
    """What it computes in, quantized layers aside."""
    bytes: int
    """Size on disk of all that it loads."""
    denoiser_bytes: int
    """Size on disk of the denoiser: graph and weights."""
    denoiser_fp32_bytes: int
    """4 x the denoiser's parameters."""
    digest: str | None = None
    """The bundle's."""
    quant: str | None = None
    """The denoiser's, of a bundle."""

    @property
    def slug(self) -> str:
        """The name as a folder name that is legal everywhere."""
        return slug(self.name)


def slug(name: str) -> str:
    """A level's name as a folder name that is legal everywhere."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


class Asked(Protocol):
    """What the comparison needs of a worker."""

    name: str

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        ...

    def close(self) -> None:
        """End it, whatever it is doing."""
        ...


class Worker:
    """A contestant's child process."""

    def __init__(self, contestant: Contestant, *, folder: Path, threads: int) -> None:
        """Start the process, its stderr in `folder`; nothing is loaded yet."""
        self.name = contestant.name
        self._log_path = folder / f"{contestant.slug}.log"
        self._log: IO[bytes] = self._log_path.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=_environment(threads),
            encoding="utf-8",
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer; the child's failure is raised as its own kind.

        Raises the KilnError that the child named, or OutOfMemory or BuildError where it died.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # a broken pipe: it died before it read the request
            line = ""
        if not line:
            raise self._death(request["op"])
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._failure(reply)
        return reply

    def close(self) -> None:
        """Kill the process: it holds nothing that is worth a farewell."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                _close_quietly(pipe)

    def _failure(self, reply: dict[str, Any]) -> errors.KilnError:
        kind = getattr(errors, reply["kind"], errors.BuildError)
        if kind is errors.BuildError:
            return errors.BuildError(
                f"{self.name} failed in the comparison: {reply['error']} (-v shows its log)",
                log=reply.get("log", ""),
            )
        error: errors.KilnError = kind(f"{self.name}: {reply['error']}")
        return error

    def _death(self, operation: str) -> errors.KilnError:
        code = self._process.wait()
        if code == -getattr(signal, "SIGKILL", 9):
            return errors.OutOfMemory(
                f"the process of {self.name} was killed during {operation!r}, which mostly means "
                f"that memory ran out; compare fewer levels at once with --levels {self.name}"
            )
        log = self._log_path.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:]
        return errors.BuildError(
            f"the process of {self.name} ended with code {code} during {operation!r}"
            " (-v shows its log)",
            log=log,
        )


def _environment(threads: int) -> dict[str, str]:
    """The parent's environment, with this package importable and as many threads for everybody."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": str(threads),
    }


def _close_quietly(pipe: IO[Any]) -> None:
    try:
        pipe.close()
    except OSError:  # unsent bytes of a dead process
        return
