"""Which prompts ranges and covariances come from, and which quality is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optimizer.drawn import Drawn
from optimizer.prompts import NEUTRAL, read_prompts
from optimizer.recipe import Recipe
from optimizer.sizes import LARGE
from profiles.errors import SpecError

__all__ = ["Calibration", "calibration_of", "default_steps"]


@dataclass(frozen=True)
class Calibration:
    """The denoising runs that ranges are taken from and quality is measured on."""

    prompts: tuple[str, ...]
    """Runs that activation ranges come from."""
    held_out: tuple[str, ...]
    """Runs that SQNR is measured on; never calibrated with."""
    trial: tuple[str, ...]
    """Runs that sensitivities are measured on; others, because codes fit the runs that they were
    found with better than new ones (by 6 dB on the reference model, with GPTQ)."""
    covariance_prompts: tuple[str, ...]
    """Runs that GPTQ's covariances come from: `prompts` and more (24 runs instead of 8 were worth
    3 dB on the reference model, at equal bytes)."""
    steps: int
    guidance: float | None
    """None: the default of diffusers' pipeline."""
    seed: int
    """Of the first of all prompts; each has its own noise."""

    @property
    def all_prompts(self) -> tuple[str, ...]:
        """Every prompt, once, the held-out ones first."""
        return tuple(dict.fromkeys((*self.held_out, *self.covariance_prompts, *self.trial)))


_MOST_TIMES = 4
"""Runs of a large model of few steps, in those of an ordinary one: 16 prompts in all."""


def default_steps(parameters: int) -> int:
    """Of a denoising run: 20, as most users draw; of a large model, two of 16 make 32 calls."""
    return 16 if parameters > LARGE else 20


def calibration_of(recipe: Recipe, folder: Path, parameters: int, drawn: Drawn) -> Calibration:
    """Prompts of the recipe, else of the model's own list where it has one, else kiln's.

    `parameters`: of the model's largest component; `recipe` says how many steps.
    """
    own = folder / "prompts" / "calibration.txt"
    path = own if own.is_file() else NEUTRAL
    prompts = list(dict.fromkeys(recipe.calibration or read_prompts(path)))
    steps = recipe.steps or default_steps(parameters)
    runs, held_out, trial, more = (2, 1, 1, 0) if parameters > LARGE else (8, 4, 2, 16)
    if parameters > LARGE and drawn.is_few_step:  # as many calls as of ordinary models
        times = min(_MOST_TIMES, max(1, default_steps(parameters) // steps))
        runs, held_out, trial = times * runs, times * held_out, times * trial
    needed = runs + held_out + trial + more
    if len(prompts) < needed:
        where = "--calibration" if recipe.calibration else str(path)
        raise SpecError(
            f"{where} holds {len(prompts)} different prompts, and {needed} are needed: add some."
        )
    calibrating, rest = prompts[:runs], prompts[runs:needed]
    return Calibration(
        prompts=tuple(calibrating),
        held_out=tuple(rest[:held_out]),
        trial=tuple(rest[held_out : held_out + trial]),
        covariance_prompts=(*calibrating, *rest[held_out + trial :]),
        steps=steps,
        guidance=drawn.guidance,
        seed=recipe.seed,
    )
