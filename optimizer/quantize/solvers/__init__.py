"""The solvers: weights in, codes and scales out, one file each; `SOLVERS` is the only list.

All of them are deterministic: the same weights and statistics give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optimizer.quantize.solvers.grid import Solve

__all__ = ["SOLVERS", "Solver", "solver_names"]


@dataclass(frozen=True)
class Solver:
    """One way to find codes."""

    name: str
    module: str
    needs: str
    """What it wants to know of a layer's inputs: "nothing", "power" or "covariance"."""
    smooths: bool = False
    """Whether layers with rounded inputs are smoothed (SmoothQuant)."""

    @property
    def solve(self) -> Solve:
        """The function; imports torch."""
        function: Solve = import_module(self.module).solve
        return function


SOLVERS: dict[str, Solver] = {
    item.name: item
    for item in (
        Solver("rtn", "optimizer.quantize.solvers.nearest", "nothing"),
        Solver("mse", "optimizer.quantize.solvers.clipping", "power"),
        Solver("hqq", "optimizer.quantize.solvers.hqq", "nothing"),
        Solver("gptq", "optimizer.quantize.solvers.gptq", "covariance"),
        Solver("smoothquant", "optimizer.quantize.solvers.clipping", "power", smooths=True),
    )
}


def solver_names() -> list[str]:
    """The legal values of --solver."""
    return list(SOLVERS)
