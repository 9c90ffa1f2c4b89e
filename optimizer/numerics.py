"""The one definition of SQNR, and what its limits are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

__all__ = ["EXACT_DB", "Sqnr", "sqnr_db", "worst_sqnr_db"]

EXACT_DB = 200.0
"""What exact equality counts as: JSON has no infinity."""


class Sqnr:
    """10*log10(sum ref^2 / sum err^2), pooled over everything added, in dB."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.signal = self.error = 0.0

    def add(self, reference: Any, output: Any) -> None:
        """Pool one pair of arrays; a NaN or infinity in `output` makes the result -200."""
        ref = np.asarray(reference, dtype=np.float64)
        out = np.asarray(output, dtype=np.float64)
        self.signal += float(np.square(ref).sum())
        error = float(np.square(ref - out).sum())
        self.error += error if math.isfinite(error) else math.inf

    @property
    def db(self) -> float:
        """The ratio so far; 200 for equality, -200 where anything wasn't finite."""
        if self.error == 0:
            return EXACT_DB
        if math.isinf(self.error) or self.signal == 0:
            return -EXACT_DB
        return max(-EXACT_DB, min(EXACT_DB, 10 * math.log10(self.signal / self.error)))


def sqnr_db(pairs: Iterable[tuple[Any, Any]]) -> float:
    """The pooled SQNR of (reference, output) pairs."""
    pooled = Sqnr()
    for reference, output in pairs:
        pooled.add(reference, output)
    return pooled.db


def worst_sqnr_db(pairs: Iterable[tuple[Sequence[Any], Sequence[Any]]]) -> float:
    """The lowest of the pooled SQNR of each output, of pairs of calls' outputs."""
    pooled: list[Sqnr] = []
    for references, outputs in pairs:
        pooled = pooled or [Sqnr() for _ in references]
        for one, reference, output in zip(pooled, references, outputs, strict=True):
            one.add(reference, output)
    return min((one.db for one in pooled), default=EXACT_DB)
