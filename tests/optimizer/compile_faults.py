"""A process that has imported what a compile needs, and forks one for each line that it reads.

A line in is JSON, [seconds, model, bundle, cache, options], where seconds say when the compile is
killed (null: it isn't); a line out is how it ended. So a compile starts in milliseconds.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["compile_here"]


def compile_here(model: str, bundle: str, cache: str, options: dict[str, Any]) -> None:
    """Compile with every stage in this process."""
    from optimizer import compile as compiling
    from optimizer.recipe import Recipe
    from runners.console import Console
    from tests.conftest import SETTINGS, _run_here

    os.environ["KILN_CACHE"] = cache
    compiling.run_stage = _run_here
    recipe = Recipe.model_validate({"model": model, **SETTINGS, "dtype": "fp32", **options})
    compiling.compile_bundle(recipe, Path(bundle), console=Console(), force=True)


def _import_everything() -> None:
    import diffusers  # noqa: F401
    import onnx  # noqa: F401
    import onnxscript  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads doesn't survive a fork


def _fork(work: Callable[..., None], arguments: list[Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work(*arguments)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def _ended(child: int, seconds: float | None) -> int:
    """The exit code of a child, killed after so many seconds; its number is its own until then."""
    limit = time.monotonic() + (math.inf if seconds is None else seconds)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= limit:
            os.kill(child, signal.SIGKILL)
            limit = math.inf
        time.sleep(0.002)


def _main() -> None:
    _import_everything()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, *arguments = json.loads(line)
        print(_ended(_fork(compile_here, arguments), seconds), flush=True)


if __name__ == "__main__":
    _main()
