"""A process that has imported the libraries, and forks one child for each stage that needs them.

Importing torch and diffusers takes ten seconds, longer than most stages of a small model. Nothing
of them has run when a child is forked, so none of their threads is lost in it. Linux only: macOS's
system libraries forbid a fork after they were used, and Windows has none.

Parent and nursery share one socket: the parent sends "fork" with the child's stdin, stdout and log;
the nursery answers with a pidfd, and once more with the exit code when the child has ended. At the
socket's end it ends.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO

__all__ = ["Forked", "Nursery", "supported"]

_ANSWER = 64

_SPINS = "10000"
"""How often a thread of torch looks whether the others are done before it sleeps (libgomp's
GOMP_SPINCOUNT). By default it looks for milliseconds, and where another program takes a core, all
wait so for the thread that lost it: a call of the reference model's UNet took 484 ms beside one
busy process, 55 alone; with this 142 and 65 (two cores)."""


def supported() -> bool:
    """Whether this system can fork so."""
    return sys.platform == "linux"


class Forked:
    """A stage forked from the nursery."""

    def __init__(self, nursery: socket.socket, log: IO[bytes]) -> None:
        """Ask the nursery's socket for a child that prints into `log`."""
        theirs, ours = os.pipe()
        self.stdin = os.fdopen(ours, "wb")
        ours, answers = os.pipe()
        self.stdout = os.fdopen(ours, "rb")
        with suppress(BrokenPipeError):  # it died; so wait says
            socket.send_fds(nursery, [b"fork"], [theirs, answers, log.fileno()])
        os.close(theirs)
        os.close(answers)
        self._nursery = nursery
        self._code: int | None = None
        self._handles = socket.recv_fds(nursery, _ANSWER, 1)[1]

    def wait(self) -> int:
        """The exit code, negative for a signal; 1 where the nursery itself couldn't start."""
        if self._code is None:
            said = self._nursery.recv(_ANSWER) if self._handles else b""
            self._code = int(said) if said else 1
        return self._code

    def close(self) -> None:
        """Kill it if it still runs."""
        for handle in self._handles:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            self.wait()
            os.close(handle)
        with suppress(BrokenPipeError):  # what it didn't read
            self.stdin.close()
        self.stdout.close()


class Nursery:
    """Starts the process with the first stage, and anew where the environment changed."""

    def __init__(self, libraries: Sequence[str]) -> None:
        """`libraries` are the modules that it imports."""
        self._libraries = libraries
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        self._environment: dict[str, str] = {}

    def fork(self, log: IO[bytes]) -> Forked:
        """A child whose stderr is `log`; it reads its job from stdin, as a fresh one does."""
        if self._running is None or self._environment != dict(os.environ):
            self.close()
            self._environment = dict(os.environ)
            self._running = _start(self._libraries, log)
        return Forked(self._running[1], log)

    def close(self) -> None:
        """End the process."""
        if self._running is not None:
            process, ours = self._running
            ours.close()
            process.wait()
            self._running = None


def _start(
    libraries: Sequence[str], log: IO[bytes]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "optimizer.worker", str(theirs.fileno()), *libraries],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=Path(__file__).parents[1],
            env=_environment(),
            pass_fds=[theirs.fileno()],
        )
    return process, ours


def _environment() -> dict[str, str]:
    """The parent's, and `_SPINS` where the user has said nothing of how threads wait."""
    said = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    return dict(os.environ) if said else {**os.environ, "GOMP_SPINCOUNT": _SPINS}


def serve(number: int, libraries: Sequence[str]) -> None:
    """Be the nursery, on the socket `number`. Returns in each child, whose standard streams are
    those that it was sent; ends the process when the socket does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # children end, and the parent then ends this
    for name in libraries:
        import_module(name)
    gc.collect()
    gc.freeze()  # else a child's first collection would copy all that it shares with this
    with socket.socket(fileno=number) as parent:
        while True:
            said, files, _, _ = socket.recv_fds(parent, _ANSWER, 3)
            if not said:
                sys.exit(0)
            if not (pid := os.fork()):
                break
            handle = os.pidfd_open(pid)
            socket.send_fds(parent, [b"started"], [handle])
            for file in (handle, *files):
                os.close(file)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with suppress(BrokenPipeError):
                parent.send(str(code).encode())
    for stream, file in enumerate(files):
        os.dup2(file, stream)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
