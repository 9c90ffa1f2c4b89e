"""Attention over a whole picture, a few queries and keys at a time: exact, in little memory.

What was found of some keys is corrected when larger scores come, as in Milakov and Gimelshein,
"Online normalizer calculation for softmax" (arXiv:1805.02867).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from runners.spilled import Spilled

__all__ = ["attend", "attended"]

_QUERIES = 2048
_KEYS = 1024
"""At a time: 8 MB of scores."""


def attend(query: Spilled, key: Spilled, value: Spilled) -> None:
    """Put what every query finds, by scores that are divided by the channels' square root, into its
    place.
    """
    for start, some in query.places(_QUERIES):
        keys, values = ((x for _, x in each.places(_KEYS)) for each in (key, value))
        query.write_places(start, attended(some, zip(keys, values, strict=True)))


def attended(query: Tensor, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """What queries [n, channels] find among the pairs of keys and values [any, channels]."""
    query = query * query.shape[-1] ** -0.5
    largest = query.new_full((len(query), 1), -torch.inf)
    weight, found = torch.zeros_like(largest), torch.zeros_like(query)
    for key, value in pairs:
        scores = query @ key.T
        top = torch.maximum(largest, scores.amax(1, keepdim=True))
        shares, before = scores.sub_(top).exp_(), (largest - top).exp()
        weight = weight * before + shares.sum(1, keepdim=True)
        found = torch.addmm(found.mul_(before), shares, value)
        largest = top
    return found / weight
