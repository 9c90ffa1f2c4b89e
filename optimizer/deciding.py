"""`--quant auto`: sensitivities and the recipe's goal -> a plan whose policy is decided."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optimizer.job import Job
from optimizer.plan import Plan, with_policy
from optimizer.quantize.budget import Costs, Goal, Solved, front, solve
from optimizer.quantize.sensitivity import Sensitivity, load_sensitivity
from optimizer.recipe import parse_budget
from profiles.errors import SpecError

__all__ = ["Choice", "decided", "matching_sensitivity", "pareto_front"]


@dataclass(frozen=True)
class Choice:
    """What was solved for, and the plan that follows."""

    plan: Plan
    solved: Solved


def decided(plan: Plan, sensitivity: Sensitivity) -> Choice:
    """The plan with the policy that loses least within the recipe's goal.

    Raises SpecError, with the nearest possible value, for a goal beyond reach.
    """
    solved = solve(sensitivity, _goal(plan), _costs(plan.denoiser))
    return Choice(with_policy(plan, solved.policy), solved)


def pareto_front(plan: Plan, sensitivity: Sensitivity) -> list[Solved]:
    """The best policies from the smallest size to the largest."""
    return front(sensitivity, _costs(plan.denoiser))


def matching_sensitivity(path: Path, plan: Plan) -> Sensitivity:
    """The file's sensitivities; SpecError where they are another model's."""
    found = load_sensitivity(path)
    if not plan.undecided:
        raise SpecError("--sensitivity needs --quant auto.")
    if found.model_digest != plan.source.digest:
        raise SpecError(
            f"{path} was measured on another model than {plan.source.name}: run `kiln analyze` on "
            "this one."
        )
    return found


def _goal(plan: Plan) -> Goal:
    recipe = plan.recipe
    if recipe.budget is None:
        return Goal(db=recipe.min_quality)
    return Goal(bytes=parse_budget(recipe.budget, 4 * plan.denoiser.parameters))


def _costs(job: Job) -> Costs:
    return Costs(job.float_bytes, job.fixed_bytes, 4 * job.parameters)
