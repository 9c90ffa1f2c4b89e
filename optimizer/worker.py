"""Each heavy stage in a process of its own: its memory goes back when it ends.

The parent sends a pickled job over the child's stdin (a private pipe, never a file); the child
answers JSON lines: progress, an error by its type's name, or done. Whatever libraries print goes to
a log that is shown when the stage fails, or with -v. A child is a fresh interpreter, or one forked
from `optimizer.nursery` that has imported torch and diffusers.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from optimizer import nursery
from optimizer.progress import Progress
from profiles import errors
from profiles.errors import BuildError, KilnError, OutOfMemory
from runners.console import quiet_libraries

__all__ = ["run_stage", "warm_stages"]

_KILLED = (-9, 137)
_LIBRARIES = ("optimizer.prepare", "optimizer.measure", "optimizer.export")
"""What warm stages share: these import torch, diffusers, transformers and onnxscript."""

_warm: ContextVar[nursery.Nursery | None] = ContextVar("_warm", default=None)


def run_stage(
    target: str, arguments: tuple[Any, ...], *, progress: Progress, warm: bool = False
) -> str:
    """Run `target` ("module:function") on `arguments` in a child and return what it printed.

    A function whose last parameter is called progress is given one. `warm` says that it needs torch
    and diffusers, so that within `warm_stages` it may be forked from a process that has them; not
    for stages that measure their memory. Raises what the child raised (a KilnError), OutOfMemory
    when the system killed it, BuildError with its log for anything else.
    """
    forks = _warm.get() if warm else None
    with (
        tempfile.TemporaryFile() as log,
        closing(_Fresh(log) if forks is None else forks.fork(log)) as child,
    ):
        with suppress(BrokenPipeError):  # it died; so its exit code says
            child.stdin.write(pickle.dumps((target, arguments)))
            child.stdin.flush()
        answer = _listen(child.stdout, progress)
        code = child.wait()
        log.seek(0)
        printed = log.read().decode("utf-8", errors="replace")
    if answer is None:
        raise _died(target, code, printed)
    if "error" in answer:
        raise _raised(answer, printed)
    return printed


@contextmanager
def warm_stages(libraries: Sequence[str] = _LIBRARIES) -> Iterator[None]:
    """Within, warm stages share one import of `libraries`, where the system can fork."""
    if not nursery.supported():
        yield
        return
    with closing(nursery.Nursery(libraries)) as forks:
        token = _warm.set(forks)
        try:
            yield
        finally:
            _warm.reset(token)


class _Fresh:
    """A stage in an interpreter of its own."""

    def __init__(self, log: IO[bytes]) -> None:
        command, pipe = [sys.executable, "-m", "optimizer.worker"], subprocess.PIPE
        root = Path(__file__).parents[1]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, cwd=root)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.stdin, self.stdout = self._process.stdin, self._process.stdout

    def wait(self) -> int:
        return self._process.wait()

    def close(self) -> None:
        """Kill it if it still runs."""
        self._process.kill()
        with suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()
        self._process.wait()


def _listen(stream: IO[bytes], progress: Progress) -> dict[str, Any] | None:
    """Pass progress on until the child's last word, which is returned; None if there is none."""
    last = None
    for line in stream:
        message = json.loads(line)
        if "progress" in message:
            progress(*message["progress"])
        else:
            last = message
    return last


def _died(target: str, code: int, printed: str) -> KilnError:
    stage = target.rpartition(":")[2].replace("_", " ").strip()
    if code in _KILLED:
        return OutOfMemory(
            f"The stage {stage!r} was killed, most likely for lack of memory: close other programs "
            "or compile on a machine with more memory; finished stages are kept."
        )
    words = (printed.strip().splitlines() or ["no message"])[-1]
    return BuildError(f"The stage {stage!r} failed (exit code {code}): {words}", log=printed)


def _raised(answer: dict[str, Any], printed: str) -> KilnError:
    cls = getattr(errors, answer["error"], None)
    log = f"{printed}{answer.get('trace', '')}"
    if not (isinstance(cls, type) and issubclass(cls, KilnError)):
        return BuildError(f"{answer['message']} (run again with -v for the log).", log=log)
    if issubclass(cls, BuildError):
        return cls(answer["message"], log=f"{answer.get('log', '')}{log}")
    return cls(answer["message"])


def _end_with_parent() -> None:
    """End when the parent has, however it ended: it holds our stdin open as long as it lives."""
    os.read(0, 1)
    os._exit(1)


def _main() -> int:
    """Be the child: the job from stdin, answers to what stdout was when we started."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the log

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    target, arguments = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, name = target.split(":")
    try:
        function = getattr(import_module(module), name)
        if "progress" in function.__code__.co_varnames[: function.__code__.co_argcount]:
            function(*arguments, lambda done, total: say({"progress": [done, total]}))
        else:
            function(*arguments)
    except KilnError as error:
        log = error.log if isinstance(error, BuildError) else ""
        say({"error": type(error).__name__, "message": str(error), "log": log})
        return error.exit_code
    except MemoryError:
        say({"error": "OutOfMemory", "message": "Not enough memory: close other programs."})
        return OutOfMemory.exit_code
    except Exception as error:
        import traceback

        trace = traceback.format_exc()
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        say({"error": type(error).__name__, "message": f"{name} failed: {first}", "trace": trace})
        return BuildError.exit_code
    say({"done": True})
    return 0


if __name__ == "__main__":
    quiet_libraries()
    if len(sys.argv) > 1:
        nursery.serve(int(sys.argv[1]), sys.argv[2:])
    ended = _main()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(ended)  # taking thousands of modules apart would take two seconds
