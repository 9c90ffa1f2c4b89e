"""Prompt files: the user's, a model's own, and kiln's neutral list (prompts.txt)."""

from __future__ import annotations

from pathlib import Path

from profiles.errors import SpecError

__all__ = ["NEUTRAL", "read_prompts"]

NEUTRAL = Path(__file__).with_name("prompts.txt")


def read_prompts(file: Path) -> tuple[str, ...]:
    """Read a text file with a prompt a line, UTF-8; blank lines don't count."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(
            f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8, a prompt a line"
        ) from error
    except OSError as error:
        raise SpecError(
            f"the prompt file {file} can't be read ({error.strerror}): give a text file with a "
            "prompt a line"
        ) from error
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise SpecError(f"{file} holds no prompt: write a prompt a line into it")
    return prompts
