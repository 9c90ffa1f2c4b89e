"""What `--control` says; nothing is read yet."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from profiles.errors import SpecError

__all__ = ["PREPROCESSORS", "Control", "parse_control"]

PREPROCESSORS = ("canny", "depth")
"""What may stand before the file."""

_HELP = "write it as FILE, FILE:WEIGHT or FILE:WEIGHT:START-END, such as edges.png:0.8:0-0.5"
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_NAMED = re.compile(r"(controlnet(?:_[1-9]\d*)?)=(.*)", re.DOTALL)
_RANGE = re.compile(r"([^-]+)-([^-]+)")


@dataclass(frozen=True)
class Control:
    """One control image, and how much it counts when."""

    file: Path
    preprocessor: str | None = None
    """What makes the map of the picture in `file`; None: it is one."""
    weight: float = 1.0
    start: float = 0.0
    """From which part of the steps on it counts, in 0..1,"""
    end: float = 1.0
    """and up to which."""
    model: Path | None = None
    """The folder of the preprocessor's own network."""
    network: str | None = None
    """The bundle's name of the network that reads it; None: that of its place in the request."""


def parse_control(text: str, depth_model: Path | None = None) -> Control:
    """What `--control [NETWORK=][PREPROCESSOR:]FILE[:WEIGHT[:START-END]]` says.

    `depth_model` is the folder that `depth:` needs. Raises SpecError for what isn't so.
    """
    named = _NAMED.fullmatch(text)
    network, rest = (named[1], named[2]) if named else (None, text)
    first, _, after = rest.partition(":")
    preprocessor, rest = (first, after) if first in PREPROCESSORS and after else (None, rest)
    drive = _DRIVE.match(rest)
    head = drive[0] if drive else ""
    file, *numbers = rest.removeprefix(head).split(":")
    if not head + file or len(numbers) > 2:
        raise SpecError(f"--control {text} can't be read: {_HELP}.")
    weight = _weight(text, numbers[0]) if numbers else 1.0
    start, end = _range(text, numbers[1]) if len(numbers) > 1 else (0.0, 1.0)
    model = _depth_model(depth_model) if preprocessor == "depth" else None
    return Control(Path(head + file), preprocessor, weight, start, end, model, network)


def _depth_model(given: Path | None) -> Path:
    folder = given or Path(os.environ.get("KILN_DEPTH_MODEL", ""))
    if folder == Path():
        raise SpecError(
            "--control depth: needs a depth estimator: give the folder of a DPT or Depth Anything "
            "with --depth-model DIR (or KILN_DEPTH_MODEL), or give a ready map of depth."
        )
    if not (folder / "config.json").is_file():
        raise SpecError(
            f"--depth-model {folder} is no folder with a config.json: give that of a DPT or Depth "
            "Anything as transformers stores it."
        )
    return folder


def _weight(text: str, number: str) -> float:
    value = _number(number)
    if value is None:
        raise SpecError(
            f"--control {text} has {number!r} for its weight, which is no number: {_HELP}; before "
            f"the file may stand {', '.join(f'{name}:' for name in PREPROCESSORS)}, which makes "
            "the map of a picture."
        )
    return value


def _range(text: str, part: str) -> tuple[float, float]:
    match = _RANGE.fullmatch(part)
    start, end = (_number(match[1]), _number(match[2])) if match else (None, None)
    if start is None or end is None:
        raise SpecError(f"--control {text} has {part!r} for its range: {_HELP}.")
    if not 0 <= start < end <= 1:
        raise SpecError(
            f"--control {text} counts from {start:g} to {end:g} of the steps: give two numbers "
            "from 0 to 1, the smaller one first."
        )
    return start, end


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
