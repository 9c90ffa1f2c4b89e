"""Which LoRAs a picture is drawn with: `--lora FILE[:weight]`, and `<lora:name:weight>` in prompts.

A prompt may come from anyone, so a tag names a file of the folders that the user gave, and never
a path.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from profiles.errors import SpecError

__all__ = ["LoraChoice", "choices_of", "lora_folders"]

_TAG = re.compile(r"<lora:([^<>]*)>")
_ENDING = ".safetensors"


@dataclass(frozen=True)
class LoraChoice:
    """A file, and how strongly it counts."""

    path: Path
    weight: float = 1.0

    @property
    def name(self) -> str:
        """As a tag names it."""
        return self.path.name.removesuffix(_ENDING)


def lora_folders(given: Sequence[Path]) -> list[Path]:
    """The folders of --lora-dir, or else of KILN_LORA_DIRS; SpecError for what is none."""
    listed = os.environ.get("KILN_LORA_DIRS", "").split(os.pathsep)
    found = list(given) or [Path(name) for name in listed if name]
    for folder in found:
        if not folder.is_dir():
            where = "--lora-dir" if given else "KILN_LORA_DIRS"
            raise SpecError(f"{where} {folder} is no folder: give one that holds LoRAs.")
    return found


def choices_of(
    options: Sequence[str], prompt: str, folders: Sequence[Path]
) -> tuple[tuple[LoraChoice, ...], str]:
    """The LoRAs of the options, then those of the prompt's tags, and the prompt without the tags.

    Raises SpecError for a missing file, a weight that is no number and a tag that isn't a name.
    """
    chosen = [_option(text) for text in options]
    chosen += [_tagged(found[1], folders) for found in _TAG.finditer(prompt)]
    names = [choice.name for choice in chosen]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SpecError(f"The LoRA {twice[0]} is given more than once: give it once, weighted.")
    plain = re.sub(r"\s{2,}", " ", _TAG.sub("", prompt)).strip() if chosen else prompt
    return tuple(chosen), plain


def _option(text: str) -> LoraChoice:
    file, _, weight = text.rpartition(":")
    if not file or Path(text).is_file():
        file, weight = text, ""
    if not weight:
        choice = LoraChoice(Path(file))
    elif (number := _number(weight)) is None:
        raise SpecError(
            f"--lora {text}: there is no such file, and {weight} is no weight: write it as "
            "FILE:0.8."
        )
    else:
        choice = LoraChoice(Path(file), number)
    if not choice.path.is_file():
        raise SpecError(f"--lora {choice.path}: there is no such file.")
    if choice.path.suffix != _ENDING:
        raise SpecError(
            f"--lora {choice.path} isn't a .safetensors file, the only kind that is read: convert "
            "it first."
        )
    return choice


def _tagged(inside: str, folders: Sequence[Path]) -> LoraChoice:
    name, *more = inside.split(":")
    tag = f"<lora:{inside}>"
    weight = 1.0
    if len(more) > 1 or (more and _number(more[0]) is None):
        raise SpecError(
            f"{tag} in the prompt has no weight that is a number: write <lora:name:0.8>."
        )
    if more:
        weight = float(more[0])
    if not name or name.startswith(".") or set(name) & set("/\\\0") or ".." in name:
        raise SpecError(
            f"{tag} in the prompt isn't a LoRA's name: a tag names a file of --lora-dir without "
            "its ending, never a path."
        )
    if not folders:
        raise SpecError(
            f"{tag} in the prompt needs a folder to be looked up in: give --lora-dir DIR or set "
            "KILN_LORA_DIRS."
        )
    for folder in folders:
        path = folder / f"{name}{_ENDING}"
        if path.is_file():
            return LoraChoice(path, weight)
    there = sorted(p.name.removesuffix(_ENDING) for f in folders for p in f.glob(f"*{_ENDING}"))
    near = get_close_matches(name, there, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    where = ", ".join(str(folder) for folder in folders)
    raise SpecError(f"{tag} in the prompt: {where} has no {name}{_ENDING}{hint}")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
