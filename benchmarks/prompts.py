"""Which prompts a comparison uses: the user's file, the model's own list, or a neutral one."""

from __future__ import annotations

from pathlib import Path

from optimizer.prompts import read_prompts
from profiles.errors import SpecError

__all__ = ["DEFAULT_COUNT", "choose_prompts"]

DEFAULT_COUNT = 16
"""Prompts taken from a list that the user didn't name."""

_OF_THE_MODEL = Path("prompts", "evaluation.txt")
_NEUTRAL = Path(__file__).with_name("prompts.txt")


def choose_prompts(
    model: Path, *, file: Path | None, count: int | None
) -> tuple[tuple[str, ...], str]:
    """Return the prompts and, in words, where they are from.

    Of the user's `file` all are taken, of another list `DEFAULT_COUNT`, unless `count` says how
    many; fewer than there are stand evenly spread over the list.
    """
    if count is not None and count < 1:
        raise SpecError(f"--count is {count}; it must be at least 1, such as --count 16")
    if file is not None:
        prompts, source = read_prompts(file), f"from {file.name}"
    elif (model / _OF_THE_MODEL).is_file():
        prompts, source = read_prompts(model / _OF_THE_MODEL), "the model's own evaluation prompts"
        count = count or DEFAULT_COUNT
    else:
        prompts, source = read_prompts(_NEUTRAL), "kiln's neutral prompts"
        count = count or DEFAULT_COUNT
    if count is None or count >= len(prompts):
        return prompts, source
    chosen = tuple(prompts[index * len(prompts) // count] for index in range(count))
    return chosen, f"{source}, {count} of {len(prompts)}, evenly spread"
