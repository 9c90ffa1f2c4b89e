"""A prompt's pieces as token ids with weights: in chunks for a CLIP, in one run for a T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runners.weighting import Piece, text_of

__all__ = ["ClipTokens", "T5Tokens", "Weighted"]

Weighted = tuple[list[int], list[float]]
"""Token ids with all special ones, and the weight of each."""


class ClipTokens:
    """Chunks of what a CLIP takes less two: each gets a start and an end of its own.

    A chunk ends where it is full and at a BREAK, which leaves an empty one where nothing stands
    before it, as in A1111.
    """

    def __init__(self, tokenizer: Any, pieces: Sequence[Piece]) -> None:
        """Read all pieces with the encoder's own tokenizer."""
        self._tokenizer = tokenizer
        self.length: int = tokenizer.model_max_length
        self.room = self.length - 2
        self.chunks: list[list[tuple[int, float]]] = [[]]
        for piece in pieces:
            if piece.starts_chunk:
                self.chunks.append([])
            for token in tokenizer(piece.text, add_special_tokens=False, verbose=False).input_ids:
                if len(self.chunks[-1]) == self.room:
                    self.chunks.append([])
                self.chunks[-1].append((token, piece.weight))
        if len(self.chunks) > 1 and not self.chunks[-1]:
            self.chunks.pop()

    def fit(self, count: int) -> str:
        """Have exactly `count` chunks; the text of those that are dropped."""
        dropped = [token for chunk in self.chunks[count:] for token, _ in chunk]
        self.chunks = self.chunks[:count] + [[]] * (count - len(self.chunks))
        return str(self._tokenizer.decode(dropped)).strip() if dropped else ""

    def padded(self, index: int) -> Weighted:
        """A chunk with start, end and padding."""
        tokenizer, chunk = self._tokenizer, self.chunks[index]
        ids = [tokenizer.bos_token_id, *(token for token, _ in chunk), tokenizer.eos_token_id]
        weights = [1.0, *(weight for _, weight in chunk), 1.0]
        short = self.length - len(ids)
        return ids + [tokenizer.pad_token_id] * short, weights + [1.0] * short


class T5Tokens:
    """The whole prompt's tokens, the same whatever its weights.

    A token has the weight of its last character. BREAK is a space.
    """

    def __init__(self, tokenizer: Any, pieces: Sequence[Piece]) -> None:
        """Read all pieces with the encoder's own tokenizer."""
        self._tokenizer = tokenizer
        self._text = text_of(pieces)
        found = tokenizer(
            self._text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        by_character = [piece.weight for piece in pieces for _ in text_of([piece])]
        self._ids: list[int] = found.input_ids
        self._starts = [start for start, _ in found.offset_mapping]
        self._weights = [by_character[max(0, end - 1)] for _, end in found.offset_mapping]

    @property
    def needed(self) -> int:
        """The tokens that hold all of it, its end included."""
        return len(self._ids) + 1

    def fit(self, length: int) -> str:
        """Have at most `length` tokens, the end included; the text of those that are dropped."""
        dropped = self._text[self._starts[length - 1] :] if self.needed > length else ""
        self._ids, self._weights = self._ids[: length - 1], self._weights[: length - 1]
        return dropped.strip()

    def padded(self, length: int) -> Weighted:
        """With end and padding."""
        short = length - self.needed
        ids = [*self._ids, self._tokenizer.eos_token_id, *[self._tokenizer.pad_token_id] * short]
        return ids, self._weights + [1.0] * (1 + short)
