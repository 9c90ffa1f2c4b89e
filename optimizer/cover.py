"""Set cover: the fewest sets that hold everything wanted."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

__all__ = ["EXACT", "Cost", "smallest_cover"]

EXACT = 16
"""Sets up to which every choice is tried: 2^16 take a fraction of a second."""

Cost = tuple[float, ...]


def smallest_cover(
    sets: list[frozenset[str]], wanted: Iterable[str], costs: list[Cost]
) -> frozenset[int]:
    """The fewest sets whose union is `wanted`; of equally few, those whose costs' sum is least.

    Exact up to `EXACT` sets that aren't empty; above, the set that adds most is taken in turn.
    """
    goal, useful = set(wanted), [index for index, one in enumerate(sets) if one]
    if len(useful) <= EXACT:
        for size in range(len(useful) + 1):
            fitting = [
                chosen
                for chosen in combinations(useful, size)
                if goal <= set().union(*(sets[index] for index in chosen))
            ]
            if fitting:
                return frozenset(min(fitting, key=lambda one: _sum(costs[i] for i in one)))
        raise ValueError("the sets don't cover what is wanted")
    left, found = set(goal), set[int]()
    while left:
        best = max(useful, key=lambda index: (len(sets[index] & left), _negated(costs[index])))
        if not sets[best] & left:
            raise ValueError("the sets don't cover what is wanted")
        found.add(best)
        left -= sets[best]
    return frozenset(found)


def _sum(costs: Iterable[Cost]) -> Cost:
    return tuple(map(sum, zip(*costs, strict=True)))


def _negated(cost: Cost) -> Cost:
    return tuple(-value for value in cost)
