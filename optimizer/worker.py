"""Each heavy stage in a process of its own: its memory goes back when it ends.

The parent sends a pickled job over the child's stdin (a private pipe, never a file); the child
answers JSON lines: progress, an error by its type's name, or done. Whatever libraries print goes to
a log that is shown when the stage fails, or with -v.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from optimizer.progress import Progress
from profiles import errors
from profiles.errors import BuildError, KilnError, OutOfMemory

__all__ = ["run_stage"]

_KILLED = (-9, 137)


def run_stage(target: str, arguments: tuple[Any, ...], *, progress: Progress) -> str:
    """Run `target` ("module:function") on `arguments` in a child and return what it printed.

    A function whose last parameter is called progress is given one. Raises what the child raised
    (a KilnError), OutOfMemory when the system killed it, BuildError with its log for anything else.
    """
    command = [sys.executable, "-m", "optimizer.worker"]
    pipe, root = subprocess.PIPE, Path(__file__).parents[1]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, cwd=root) as child,
    ):
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(pickle.dumps((target, arguments)))
            child.stdin.flush()
            answer = _listen(child.stdout, progress)
            code = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
        log.seek(0)
        printed = log.read().decode("utf-8", errors="replace")
    if answer is None:
        raise _died(target, code, printed)
    if "error" in answer:
        raise _raised(answer, printed)
    return printed


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

    from runners.console import quiet_libraries

    quiet_libraries()
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
    sys.exit(_main())
