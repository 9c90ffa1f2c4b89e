"""A1111's prompt weights: `(word)`, `(word:1.2)`, `[word]`, nested; backslashes escape brackets.

A `BREAK` between words ends the chunk of tokens that they are encoded in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from profiles.errors import SpecError

__all__ = ["Piece", "plain_text", "text_of", "weighted"]


@dataclass(frozen=True)
class Piece:
    """Text and the factor of its tokens' embeddings."""

    text: str
    weight: float = 1.0
    starts_chunk: bool = False
    """Whether a BREAK stands before it, which may be all that it holds."""


_STEP = 1.1
"""A round bracket multiplies by it, a square one divides (A1111's wiki, Attention/emphasis)."""

_MOST = 10.0
"""The largest weight that is taken, of either sign: pictures are lost long before."""

_DEEPEST = 100

_TOKEN = re.compile(
    r"\\(?P<escaped>[\\()\[\]])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<text>[^\\:()\[\]]+|.)",
    re.DOTALL,
)

_BREAK = re.compile(r"\s*\bBREAK\b\s*")


def weighted(prompt: str) -> list[Piece]:
    """The prompt's text in pieces of one weight, brackets resolved; [] where there is no text.

    As in A1111, a bracket that is never closed reaches to the end, and one that was never opened is
    text. Raises SpecError for weights beyond -10..10 and for brackets 100 deep.
    """
    reader = _Reader()
    for token in _TOKEN.finditer(prompt):
        reader.take(token)
    return reader.finished()


def plain_text(prompt: str) -> str | None:
    """The prompt with its escapes resolved, or None where it holds weights."""
    pieces = weighted(prompt)
    if any(piece.weight != 1.0 for piece in pieces):
        return None
    return text_of(pieces)


def text_of(pieces: Sequence[Piece]) -> str:
    """The text of all pieces, for an encoder that has no chunks: a BREAK is a space."""
    return "".join(f" {piece.text}" if piece.starts_chunk else piece.text for piece in pieces)


class _Reader:
    """What was read so far: texts, their weights, and where the open brackets stand."""

    def __init__(self) -> None:
        self._texts, self._weights = [""], [1.0]
        self._open: dict[str, list[int]] = {"(": [], "[": []}
        self._breaks: set[int] = set()

    def take(self, token: re.Match[str]) -> None:
        bracket = token["bracket"]
        if token["weight"] and self._open["("]:
            self._close("(", float(token["weight"]))
        elif bracket in ("(", "["):
            self._begin(bracket)
        elif bracket == ")" and self._open["("]:
            self._close("(", _STEP)
        elif bracket == "]" and self._open["["]:
            self._close("[", 1 / _STEP)
        elif token["escaped"]:
            self._texts[-1] += token["escaped"]
        else:
            self._read(token[0])

    def finished(self) -> list[Piece]:
        for kind, factor in (("(", _STEP), ("[", 1 / _STEP)):
            while self._open[kind]:
                self._close(kind, factor)
        pieces: list[Piece] = []
        for index, (text, weight) in enumerate(zip(self._texts, self._weights, strict=True)):
            _check(text, weight)
            factor = round(weight, 6) if text else 1.0
            piece = Piece(text, factor, starts_chunk=index in self._breaks)
            if pieces and pieces[-1].weight == piece.weight and not piece.starts_chunk:
                pieces[-1] = replace(pieces[-1], text=pieces[-1].text + text)
            elif text or piece.starts_chunk:
                pieces.append(piece)
        return pieces

    def _read(self, text: str) -> None:
        first, *others = _BREAK.split(text)
        self._texts[-1] += first
        for part in others:
            self._start_piece()
            self._breaks.add(len(self._texts) - 1)
            self._texts[-1] = part

    def _begin(self, bracket: str) -> None:
        if sum(map(len, self._open.values())) >= _DEEPEST:
            raise SpecError(
                f"The prompt opens more than {_DEEPEST} brackets in each other: give the weight as "
                r"a number, (word:1.2), or write \( for a bracket that is text."
            )
        self._open[bracket].append(len(self._texts))
        self._start_piece()

    def _close(self, kind: str, factor: float) -> None:
        for index in range(self._open[kind].pop(), len(self._texts)):
            self._weights[index] *= factor
        self._start_piece()

    def _start_piece(self) -> None:
        self._texts.append("")
        self._weights.append(1.0)


def _check(text: str, weight: float) -> None:
    if text and abs(weight) > _MOST:
        raise SpecError(
            f'The prompt gives "{text[:40]}" the weight {weight:.4g}: use {-_MOST:g} to {_MOST:g}.'
        )
