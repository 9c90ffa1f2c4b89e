"""What kiln says while it works: progress on stderr, results on stdout.

On a terminal, stages are rich progress bars with an ETA. When stderr is no terminal there is one
line a stage. With `--json`, stdout holds exactly one JSON line and everything else goes to stderr.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Console", "Stage", "finite_json", "native_output_to_stderr", "quiet_libraries"]


class Stage:
    """One stage under way: `advance` and `note` update its line."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        """Take a rich task, or None where stderr is no terminal."""
        self._progress, self._task = progress, task
        self.detail = ""

    def advance(self, steps: float = 1) -> None:
        """Count `steps` more as done."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, steps)

    def progress(self, done: float, total: float) -> None:
        """Say that `done` of `total` steps are done."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def note(self, detail: str) -> None:
        """Keep a short result, shown when the stage ends."""
        self.detail = detail


class Console:
    """Where commands print: `stage` for work, `info` for sentences, `result` for the answer."""

    def __init__(self, *, json_output: bool = False, verbose: bool = False) -> None:
        """With `json_output`, nothing but the one JSON line goes to stdout."""
        self.json_output, self.verbose = json_output, verbose
        self.terminal = sys.stderr.isatty()

    def info(self, text: str) -> None:
        """Print one sentence to stderr."""
        print(text, file=sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """Print to stderr with `-v` only."""
        if self.verbose:
            self.info(text)

    def result(self, text: str, document: dict[str, Any]) -> None:
        """Print the answer: `document` as one JSON line with `--json`, else `text`."""
        print(finite_json(document) if self.json_output else text, flush=True)

    @contextmanager
    def stage(
        self, name: str, total: float | None = None, *, in_bytes: bool = False
    ) -> Iterator[Stage]:
        """Show one stage: a bar with ETA on a terminal, one line when done elsewhere.

        With `in_bytes`, steps are bytes, and the bar shows their rate as well.
        """
        start = time.monotonic()
        if not self.terminal:
            stage = Stage(None, None)
            yield stage
        else:
            from rich import progress as rp
            from rich.console import Console as RichConsole

            counted = (
                (rp.DownloadColumn(), rp.TransferSpeedColumn())
                if in_bytes
                else (rp.MofNCompleteColumn(),)
            )
            columns = (
                rp.TextColumn("{task.description}"),
                rp.BarColumn(),
                *counted,
                rp.TimeElapsedColumn(),
                rp.TimeRemainingColumn(),
            )

            with rp.Progress(*columns, console=RichConsole(stderr=True), transient=True) as bar:
                stage = Stage(bar, bar.add_task(name, total=total))
                yield stage
        seconds = time.monotonic() - start
        self.info(f"{name}: {stage.detail + ', ' if stage.detail else ''}{seconds:.1f} s")


def finite_json(document: object) -> str:
    """One line of JSON with neither NaN nor Infinity: what can't be measured is null."""

    def clean(value: object) -> object:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {str(key): clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        return value

    return json.dumps(clean(document), allow_nan=False, ensure_ascii=False)


@contextmanager
def native_output_to_stderr() -> Iterator[None]:
    """Send what native code prints to stdout to stderr: stdout is for results alone."""
    import ctypes

    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        runtime = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
        runtime.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def quiet_libraries() -> None:
    """Silence the libraries' warnings and progress bars; ours and errors remain.

    Called before the heavy imports, because several libraries read these variables at import.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    for name in (
        "huggingface_hub",
        "torch.onnx",
        "torch.export",
        "onnxscript",
        "onnx_ir",
        "transformers",
        "diffusers",
        "bitsandbytes",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
