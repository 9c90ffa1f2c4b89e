"""How models of few steps are recorded, and drawn by default; nothing is compiled here."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from optimizer.calibration import calibration_of
from optimizer.compile import _Stages, plan_recipe
from optimizer.denoising import _scheduled, _to_change
from optimizer.families.base_checkpoint import assets
from optimizer.families.few_step import FEW_STEP
from optimizer.plan import Plan
from optimizer.recipe import Recipe
from optimizer.sizes import LARGE
from optimizer.store import Store
from profiles import hardware
from profiles.errors import SpecError, UnsupportedError
from runners.console import Console
from tests.tiny_pipelines import tiny_flux, tiny_lcm, tiny_sd3

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""diffusers 0.42's Euler schedulers on numpy 2."""

Kiln = Callable[..., Any]

SDXL_REPOSITORY = {
    **json.loads((assets("sdxl") / "scheduler" / "scheduler_config.json").read_text()),
    "clip_sample": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
"""The whole scheduler_config.json of stable-diffusion-xl-base-1.0."""
SD1 = json.loads((assets("sd1") / "scheduler" / "scheduler_config.json").read_text())
KARRAS = {**SD1, "_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}
AS_THE_CARDS_SAY: dict[str, dict[str, Any]] = {
    "hyper": {"timestep_spacing": "trailing"},
    "lcm": {},
    "lightning": {"timestep_spacing": "trailing"},
    "turbo": {"timestep_spacing": "trailing"},
}


def planned(model: Path, **fields: Any) -> Plan:
    return plan_recipe(Recipe.model_validate({"model": str(model), **fields}))[0]


def changed(model: Path, folder: Path, **scheduler: Any) -> Path:
    """A copy of the model with another scheduler's config."""
    copy = Path(shutil.copytree(model, folder / "model"))
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **scheduler}))
    return copy


@pytest.mark.parametrize("own", [SD1, SDXL_REPOSITORY], ids=["sd1", "sdxl"])
@pytest.mark.parametrize("kind", FEW_STEP)
def test_schedulers_are_those_that_the_cards_make(kind: str, own: dict[str, Any]) -> None:
    """The cards: another class from the pipeline's scheduler config, its steps trailing."""
    found = FEW_STEP[kind].scheduler_config(own)
    cls = getattr(diffusers, found["_class_name"])
    theirs = getattr(diffusers, own["_class_name"]).from_config(own)
    wanted = cls.from_config(theirs.config, **AS_THE_CARDS_SAY[kind])
    ours, names = cls.from_config(found), set(inspect.signature(cls).parameters)
    assert set(found) <= {*names, "_class_name"}, "nothing that the class would warn of"
    assert {n: ours.config[n] for n in names} == {n: wanted.config[n] for n in names}
    for scheduler in (ours, wanted):
        scheduler.set_timesteps(4)
    assert ours.timesteps.tolist() == wanted.timesteps.tolist()
    assert ours.timesteps[0] == 999


def test_a_spacing_of_sigmas_that_others_like_is_not_kept() -> None:
    """A distilled model knows the steps that it was distilled to."""
    found = FEW_STEP["lightning"].scheduler_config(KARRAS)
    assert "use_karras_sigmas" not in found
    assert found["beta_schedule"] == KARRAS["beta_schedule"]


def test_asked_for_it_is_recorded_and_drawn_so(tiny_model: Path) -> None:
    plan = planned(tiny_model, few_step="lightning")
    assert plan.drawn.scheduler["_class_name"] == "EulerDiscreteScheduler"
    assert plan.drawn.scheduler["timestep_spacing"] == "trailing"
    assert plan.drawn.defaults == {"steps": 4, "guidance": 0.0}
    assert (plan.calibration.steps, plan.calibration.guidance) == (4, 0.0)
    eight = planned(tiny_model, few_step="lightning", steps=8)
    assert eight.drawn.defaults["steps"] == eight.calibration.steps == 8
    again = plan_recipe(plan.recipe)[0]
    assert (again.recipe, again.drawn) == (plan.recipe, plan.drawn)


def test_it_wins_over_the_models_own_recommendation(tiny_model: Path, tmp_path: Path) -> None:
    model = changed(tiny_model, tmp_path)
    (model / "kiln.json").write_text(json.dumps({"steps": 30, "guidance": 6}))
    assert planned(model).drawn.defaults == {"steps": 30, "guidance": 6}
    assert planned(model, few_step="turbo").drawn.defaults == {"steps": 4, "guidance": 0.0}


def test_without_it_an_ordinary_model_is_as_its_folder_says(tiny_model: Path) -> None:
    drawn = planned(tiny_model, steps=7).drawn
    assert drawn.scheduler == json.loads(
        (tiny_model / "scheduler" / "scheduler_config.json").read_text()
    )
    assert (drawn.defaults, drawn.steps, drawn.guidance) == ({}, 7, None)


def test_every_kind_is_another_bundle(tiny_model: Path) -> None:
    machine = hardware.detect()
    keys = {
        _Stages(planned(tiny_model, few_step=kind), machine, Console(), Store()).bundle_key
        for kind in (None, *FEW_STEP)
    }
    assert len(keys) == 1 + len(FEW_STEP)


def test_a_folder_that_names_a_consistency_models_scheduler_needs_no_option(
    tiny_model: Path, tmp_path: Path
) -> None:
    drawn = planned(changed(tiny_model, tmp_path, _class_name="LCMScheduler")).drawn
    assert drawn.scheduler["_class_name"] == "LCMScheduler"
    assert drawn.scheduler["steps_offset"] == 1, "the folder's own, untouched"
    assert drawn.defaults == {"steps": 4, "guidance": 0.0}


def test_a_unet_that_takes_guidance_gets_it_and_no_second_half(tmp_path: Path) -> None:
    plan = planned(tiny_lcm(tmp_path / "lcm"))
    assert plan.drawn.defaults == {"steps": 4, "guidance": 8.0}
    names = [spec.name for spec in plan.denoiser.signature.inputs]
    assert names == ["sample", "time_features", "timestep_cond", "encoder_hidden_states"]
    assert plan.denoiser.signature.inputs[2].axes == ("batch", 24)


@pytest.mark.parametrize("guided", [False, True], ids=["schnell", "dev"])
def test_schnell_is_drawn_in_four_steps(tmp_path: Path, guided: bool) -> None:
    plan = planned(tiny_flux(tmp_path / "flux", guided=guided))
    assert plan.drawn.defaults == ({} if guided else {"steps": 4, "guidance": 0.0})
    assert plan.calibration.guidance == (None if guided else 0.0)


def test_sd3s_turbo_keeps_its_scheduler(tmp_path: Path) -> None:
    model = tiny_sd3(tmp_path / "sd3", t5=False)
    drawn = planned(model, few_step="turbo").drawn
    assert drawn.scheduler == planned(model).drawn.scheduler
    assert drawn.defaults == {"steps": 4, "guidance": 0.0}
    with pytest.raises(UnsupportedError) as caught:
        planned(model, few_step="lcm")
    assert str(caught.value) == (
        "--few-step lcm is not for Stable Diffusion 3 and 3.5: use --few-step turbo, or leave it "
        "out."
    )


def test_a_family_that_says_it_itself_refuses_the_option(kiln: Kiln, tmp_path: Path) -> None:
    model = tiny_flux(tmp_path / "flux", guided=False)
    ended = kiln("compile", model, "--few-step", "turbo", "--dry-run")
    assert ended.code == 10
    assert ended.sentence == (
        "Error: --few-step turbo is not for FLUX.1: leave it out, its own files say it."
    )


def test_an_unknown_kind_names_the_known_ones(kiln: Kiln, tiny_model: Path) -> None:
    ended = kiln("compile", tiny_model, "--few-step", "fast", "--dry-run")
    assert ended.code == 2
    assert ended.sentence == (
        "Error: --few-step fast is not known: use one of hyper, lcm, lightning, turbo."
    )


def test_a_dry_run_shows_it(kiln: Kiln, tiny_model: Path) -> None:
    ended = kiln("compile", tiny_model, "--few-step", "turbo", "--dry-run", "--json")
    document = json.loads(ended.out)
    assert document["recipe"]["few_step"] == "turbo"
    assert document["scheduler"]["_class_name"] == "EulerAncestralDiscreteScheduler"
    assert document["defaults"] == {"steps": 4, "guidance": 0.0}
    text = kiln("compile", tiny_model, "--few-step", "turbo", "--dry-run").out
    assert "4 steps each with EulerAncestralDiscreteScheduler" in text


def test_a_large_model_of_few_steps_is_recorded_as_often_as_others(tiny_model: Path) -> None:
    few = planned(tiny_model, few_step="lcm")
    ordinary = planned(tiny_model, steps=16)
    for steps, runs, held_out in ((16, 2, 1), (8, 4, 2), (4, 8, 4), (1, 8, 4)):
        recipe = few.recipe.model_copy(update={"steps": steps})
        found = calibration_of(recipe, tiny_model, LARGE + 1, few.drawn)
        assert (len(found.prompts), len(found.held_out)) == (runs, held_out)
        assert len(set(found.all_prompts)) == len(found.prompts) + 2 * held_out
    found = calibration_of(ordinary.recipe, tiny_model, LARGE + 1, ordinary.drawn)
    assert len(found.prompts) * found.steps == 32
    short = few.recipe.model_copy(update={"calibration": ("one", "two")})
    with pytest.raises(SpecError, match="and 16 are needed: add some"):
        calibration_of(short, tiny_model, LARGE + 1, few.drawn)


def test_as_many_steps_are_scheduled_as_run_at_a_strength() -> None:
    for strength in (0.3, 0.8, 0.35, 0.07, 1.0):
        for steps in range(1, 60):
            assert int(_scheduled(steps, strength) * strength) == steps


def test_pictures_to_change_have_the_spectrum_of_photographs() -> None:
    """Amplitudes fall as 1/f: halving the frequency doubles them, within the noise of one draw."""
    first, again, other = (np.asarray(_to_change(128, seed), float) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).mean() > 10
    spectrum = np.abs(np.fft.fft2(first, axes=(0, 1)))
    rings = np.hypot(*np.meshgrid(*(np.fft.fftfreq(128, 1 / 128),) * 2))
    low, high = (spectrum[(rings >= r) & (rings < 1.2 * r)].mean() for r in (8, 32))
    assert 2 < low / high < 8
