"""JSON that means one thing only: UTF-8, no key twice, neither NaN nor Infinity, not too deep."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["strict_json"]


def strict_json(raw: bytes) -> Any:
    """The document in `raw`; ValueError says what is wrong with it.

    Parsers differ in which of two equal keys they take, so a document that has them could show one
    thing to whoever signs it and another to whoever runs it.
    """
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no number")
