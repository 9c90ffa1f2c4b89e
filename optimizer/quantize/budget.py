"""Sensitivities and a goal -> the policy that loses least: one integer program.

Every layer gets one of its measured schemes. Noise powers add up where layers' errors are
independent (on the reference model sums were within 0.5 dB of what the policies then measured, on
the same calls); so both the noise and the bytes of a policy are linear in the choices, and HiGHS
(through scipy) finds the best ones to 0.01 %.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from optimizer.quantize.policy import Policy, Rule
from optimizer.quantize.schemes import KEEP
from optimizer.quantize.sensitivity import Loss, Sensitivity, sqnr_of
from profiles.errors import SpecError
from runners.console import native_output_to_stderr

__all__ = ["Costs", "Goal", "Solved", "front", "require_reachable", "solve"]

_GAP = 1e-4
_FRONT_POINTS = 8


@dataclass(frozen=True)
class Costs:
    """What an engine weighs besides its layers' weights."""

    float_bytes: int
    """Of a number that isn't quantized."""
    fixed_bytes: int
    """Of everything that isn't a layer's weight, the graph included."""
    fp32_bytes: int
    """What ratios refer to."""


@dataclass(frozen=True)
class Goal:
    """At most so many bytes, or at least so many dB; one of the two."""

    bytes: int | None = None
    db: float | None = None


@dataclass(frozen=True)
class Solved:
    """A policy, and what it is predicted to weigh and lose."""

    policy: Policy
    bytes: int
    db: float
    counts: dict[str, int]
    """Scheme -> layers."""
    ratio: float
    """Of the fp32 bytes."""

    def describe(self) -> str:
        """In one line."""
        layers = ", ".join(f"{count} {label}" for label, count in sorted(self.counts.items()))
        return f"{self.ratio:.3f}x of fp32, {self.db:.1f} dB predicted: {layers}"


def solve(sensitivity: Sensitivity, goal: Goal, costs: Costs) -> Solved:
    """The best policy within the goal.

    Raises SpecError, with the smallest size or the best quality possible, for a goal beyond reach.
    """
    problem = _Problem(sensitivity, costs)
    if goal.bytes is not None:
        require_reachable(goal.bytes, problem.least_bytes, costs.fp32_bytes)
    if goal.db is not None and goal.db > problem.best_db:
        raise SpecError(
            f"--min-quality {goal.db:g} can't be met: the best possible is "
            f"{problem.best_db - 0.05:.1f} dB."
        )
    return problem.solved(problem.choose(goal))


def require_reachable(wanted: int, least: int, fp32_bytes: int) -> None:
    """Raise SpecError, with the smallest size possible, for a budget below it."""
    if wanted < least:
        raise SpecError(
            f"--budget {wanted / fp32_bytes:.3f}x can't be met: the smallest possible is "
            f"{math.ceil(1000 * least / fp32_bytes) / 1000:.3f}x ({least} bytes)."
        )


def front(sensitivity: Sensitivity, costs: Costs) -> list[Solved]:
    """The Pareto front: the best policies from the smallest size to the largest."""
    problem = _Problem(sensitivity, costs)
    least, most = problem.least_bytes, problem.most_bytes
    sizes = [least + (most - least) * i // (_FRONT_POINTS - 1) for i in range(_FRONT_POINTS)]
    return [problem.solved(problem.choose(Goal(bytes=size))) for size in sizes]


class _Problem:
    def __init__(self, sensitivity: Sensitivity, costs: Costs) -> None:
        import numpy as np

        self._sensitivity, self._costs = sensitivity, costs
        kept = Loss(scheme=KEEP, noise=0.0)
        self._options: list[tuple[str, Loss]] = [
            (name, loss)
            for name, layer in sensitivity.layers.items()
            for loss in (*layer.losses, kept)
        ]
        self._bytes = np.array([self._stored(name, loss) for name, loss in self._options], float)
        self._noise = np.array([loss.noise for _, loss in self._options])
        names = {name: row for row, name in enumerate(sensitivity.layers)}
        self._rows = np.array([names[name] for name, _ in self._options])

    def _stored(self, name: str, loss: Loss) -> int:
        shape = self._sensitivity.layers[name].shape
        return loss.scheme.stored_bytes(shape, self._costs.float_bytes)

    def _sum_by_layer(self, values: Any, pick: Any) -> float:
        return sum(
            float(pick(values[self._rows == row])) for row in range(len(self._sensitivity.layers))
        )

    @property
    def least_bytes(self) -> int:
        """Of the policy with the smallest scheme everywhere."""
        return self._costs.fixed_bytes + int(self._sum_by_layer(self._bytes, min))

    @property
    def most_bytes(self) -> int:
        """Of the policy that keeps every layer."""
        return self._costs.fixed_bytes + int(self._sum_by_layer(self._bytes, max))

    @property
    def best_db(self) -> float:
        """Of the policy with the best scheme everywhere."""
        return sqnr_of(self._sum_by_layer(self._noise, min))

    def choose(self, goal: Goal) -> Any:
        """Which options are taken, as a mask."""
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        count = len(self._options)
        each = csr_array(
            (np.ones(count), (self._rows, np.arange(count))),
            shape=(len(self._sensitivity.layers), count),
        )
        noise = self._noise / max(self._noise.max(), 1e-30)
        size = self._bytes / self._bytes.max()
        if goal.bytes is not None:
            objective, limited = noise, size
            limit = (goal.bytes - self._costs.fixed_bytes) / self._bytes.max()
        else:
            assert goal.db is not None
            objective, limited = size, noise
            limit = 10 ** (-goal.db / 10) / max(self._noise.max(), 1e-30)
        with native_output_to_stderr():  # HiGHS has a message that no option turns off
            result = milp(
                objective,
                constraints=[
                    LinearConstraint(each, 1, 1),
                    LinearConstraint(limited[None], -np.inf, limit),
                ],
                integrality=np.ones(count),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": _GAP},
            )
        if result.x is None:
            raise SpecError(f"No policy meets the goal ({result.message}).")
        return result.x > 0.5

    def solved(self, chosen: Any) -> Solved:
        """The policy of a choice: the commonest scheme for all, the others by name."""
        taken = [option for option, is_taken in zip(self._options, chosen, strict=True) if is_taken]
        schemes = {name: loss.scheme for name, loss in taken}
        common = Counter(schemes.values()).most_common(1)[0][0]
        rules = [
            Rule(pattern=name, scheme=scheme)
            for name, scheme in schemes.items()
            if scheme != common
        ]
        total = self._costs.fixed_bytes + int(self._bytes[chosen].sum())
        return Solved(
            policy=Policy(
                rules=(*rules, Rule(pattern="*", scheme=common)), solver=self._sensitivity.solver
            ),
            bytes=total,
            db=sqnr_of(float(self._noise[chosen].sum())),
            counts=dict(Counter(scheme.label for scheme in schemes.values())),
            ratio=total / self._costs.fp32_bytes,
        )
