"""What a model is drawn with where nobody says otherwise: its scheduler, steps and guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optimizer.configs import Config, read_json
from optimizer.families.base import Family, FewStep
from optimizer.recipe import Recipe
from optimizer.source import ModelSource
from profiles.errors import UnsupportedError

__all__ = ["Drawn", "drawn_with"]


@dataclass(frozen=True)
class Drawn:
    """How pictures are drawn, in recorded runs and by default."""

    scheduler: dict[str, Any]
    """Its config, diffusers' class in `_class_name`."""
    defaults: dict[str, int | float]
    """steps and guidance that go into the manifest; absent ones are the pipeline's."""
    steps: int | None
    """Of recorded runs, where somebody says it."""
    is_few_step: bool

    @property
    def guidance(self) -> float | None:
        """Of recorded runs; None is the pipeline's own default."""
        return self.defaults.get("guidance")


def drawn_with(
    recipe: Recipe, source: ModelSource, known: Family, configs: Mapping[str, Mapping[str, Any]]
) -> Drawn:
    """What the recipe, the model's kiln.json and its configs say, in this order.

    A model of few steps was distilled to a number of them, so `--steps` is its default too. Raises
    UnsupportedError for a `--few-step` that the family hasn't.
    """
    own = source.component_config("scheduler")
    recommended = _recommended(source)
    found = _few_step(recipe.few_step, known, {**configs, "scheduler": own})
    if found is None:
        steps = recipe.steps or int(recommended.get("steps", 0)) or None
        return Drawn(own, recommended, steps, is_few_step=False)
    told: dict[str, int | float] = {"steps": found.steps, "guidance": found.guidance}
    defaults = {**told, **recommended} if recipe.few_step is None else {**recommended, **told}
    if recipe.steps is not None:
        defaults["steps"] = recipe.steps
    return Drawn(found.scheduler_config(own), defaults, int(defaults["steps"]), is_few_step=True)


def _few_step(
    kind: str | None, known: Family, configs: Mapping[str, Mapping[str, Any]]
) -> FewStep | None:
    if kind is None or kind in known.few_step_kinds:
        return known.few_step(configs, kind)
    legal = " or ".join(f"--few-step {name}" for name in known.few_step_kinds)
    raise UnsupportedError(
        f"--few-step {kind} is not for {known.title}: "
        + (f"use {legal}, or leave it out." if legal else "leave it out, its own files say it.")
    )


def _recommended(source: ModelSource) -> dict[str, int | float]:
    """Steps and guidance that the model's own kiln.json recommends."""
    path = source.folder / "kiln.json"
    if not path.is_file():
        return {}
    config = Config(read_json(path), path)
    return {key: config[key] for key in ("steps", "guidance") if key in config}
