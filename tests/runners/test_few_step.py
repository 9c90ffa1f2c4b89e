"""Models of few steps on engines: pictures as diffusers draws them, and what can't be asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import runners
from profiles.errors import SpecError
from runners.bundle import read_manifest
from runners.denoisers import FEEDS
from runners.modules import WRAPPERS
from runners.requests import Request
from runners.schedulers import SCHEDULERS, with_scheduler
from runners.workflows import pictures
from tests.conftest import SETTINGS, _run_here
from tests.tiny_pipelines import tiny_lcm, tiny_unet_xl

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""diffusers 0.42's Euler schedulers on numpy 2."""

Kiln = Callable[..., Any]
MakeBundle = Callable[..., Path]
PROMPT = "a red circle"
LIMIT = 1
"""In 255: fp32 sums in another order move a picture by 1e-5, which crosses at most one rounding."""


@pytest.fixture(scope="module")
def lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lcm(tmp_path_factory.mktemp("few") / "tiny-lcm")


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model, said to be a turbo."""
    from optimizer.compile import compile_bundle
    from optimizer.recipe import Recipe
    from runners.console import Console

    fields = {"model": str(tiny_model), "backend": "eager", "quant": "none", "dtype": "fp32"}
    recipe = Recipe.model_validate({**fields, **SETTINGS, "few_step": "turbo"})
    out = tmp_path_factory.mktemp("few") / "turbo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optimizer.compile.run_stage", _run_here)
        compile_bundle(recipe, out, console=Console())
    return out


@pytest.fixture(scope="module")
def loaded(bundle: MakeBundle, lcm: Path, turbo: Path) -> Iterator[Callable[..., Any]]:
    """`loaded("lcm" or "turbo", task)`: a bundle's pipeline, loaded once."""
    pipelines: dict[tuple[str, str], Any] = {}

    def get(name: str, task: str = "text-to-image") -> Any:
        if (name, task) not in pipelines:
            made = turbo if name == "turbo" else bundle("onnxruntime", model=lcm)
            pipelines[name, task] = runners.load(made, task=task, threads=1)
        return pipelines[name, task]

    yield get
    for pipeline in pipelines.values():
        pipeline.kiln.close()


def picture(width: int = 64, height: int = 64) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def mask(width: int = 64, height: int = 64) -> Image.Image:
    image = Image.new("L", (width, height))
    image.paste(255, (8, 8, width // 2, height))
    return image


def drawn(pipeline: Any, seeds: tuple[int, ...] = (3,), **how: Any) -> np.ndarray[Any, Any]:
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 4, "guidance_scale": 6.0, **how}
    generator = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    images = pipeline([PROMPT] * len(seeds), **given, generator=generator).images
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


LCM_TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "text-to-image": ("LatentConsistencyModelPipeline", {"width": 96, "height": 48}),
    "img2img": ("LatentConsistencyModelImg2ImgPipeline", {"strength": 0.5}),
    "inpaint": ("StableDiffusionInpaintPipeline", {"width": 64, "height": 64}),
}


@pytest.mark.parametrize("task", LCM_TASKS)
def test_an_lcms_pictures_are_diffusers_own(
    loaded: Callable[..., Any], lcm: Path, task: str
) -> None:
    """Alone, and two together without guidance's other half; guidance is an input."""
    plain = diffusers.DiffusionPipeline.from_pretrained(lcm, local_files_only=True)
    ours, (name, how) = loaded("lcm", task), LCM_TASKS[task]
    theirs = getattr(diffusers, name)(**plain.components, requires_safety_checker=False)
    assert type(ours) is type(theirs)
    seen = []
    for seeds in ((3,), (4, 5)):
        edits = {"image": [picture()] * len(seeds), "mask_image": [mask()] * len(seeds)}
        taken = {"text-to-image": 0, "img2img": 1, "inpaint": 2}[task]
        given = {**how, **dict(list(edits.items())[:taken])}
        wanted = drawn(theirs, seeds, **given)
        assert wanted.std() > 1, "a flat picture proves nothing"
        assert np.abs(wanted - drawn(ours, seeds, **given)).max() <= LIMIT
        seen.append(drawn(ours, seeds, **given, guidance_scale=1.0))
        assert np.abs(seen[-1] - wanted).max() > LIMIT, "guidance has its say"


def test_a_turbos_pictures_are_those_that_its_card_makes(
    loaded: Callable[..., Any], tiny_model: Path
) -> None:
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    theirs.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(
        theirs.scheduler.config, timestep_spacing="trailing"
    )
    ours = loaded("turbo")
    for steps in (1, 4):
        how = {"num_inference_steps": steps, "guidance_scale": 0.0}
        wanted = drawn(theirs, **how)
        assert np.abs(wanted - drawn(ours, **how)).max() <= LIMIT
        assert theirs.scheduler.timesteps.tolist() == ours.scheduler.timesteps.tolist()
        assert ours.scheduler.timesteps[0] == 999


def test_recorded_calls_hold_no_second_half(turbo: Path, tiny_model: Path) -> None:
    """Four steps of one picture without guidance, on each of four prompts that are held out."""
    from optimizer.calls import load_calls
    from optimizer.compile import _Stages, plan_recipe
    from optimizer.recipe import Recipe
    from optimizer.store import Store
    from profiles import hardware
    from runners.console import Console

    recipe = {**read_manifest(turbo).recipe, "model": str(tiny_model)}
    plan, _ = plan_recipe(Recipe.model_validate(recipe))
    recorded = _Stages(plan, hardware.detect(), Console(), Store()).record()
    calls = load_calls(recorded / "unet.safetensors")
    assert len(calls) == 16
    assert {call.inputs[0].shape for call in calls.values()} == {(1, 4, 16, 16)}


def test_defaults_are_the_bundles(kiln: Kiln, turbo: Path, tmp_path: Path) -> None:
    ended = kiln("generate", turbo, "--prompt", PROMPT, "-o", tmp_path / "a.png", "--json")
    facts = json.loads(ended.out)
    assert (facts["steps"], facts["guidance"]) == (4, 0.0)
    assert facts["scheduler"] == "EulerAncestralDiscreteScheduler"
    assert "default    steps 4, guidance 0" in kiln("inspect", turbo).out
    one = kiln(
        "generate", turbo, "--prompt", PROMPT, "--steps", 1, "-o", tmp_path / "b.png", "--json"
    )
    assert json.loads(one.out)["steps"] == 1


def draw(pipeline: Any, **what: Any) -> tuple[dict[str, Any], list[str]]:
    """The last picture's facts, and what was said."""
    said: list[str] = []
    found = list(pictures(pipeline, Request(PROMPT, seed=3, **what), say=said.append))
    return found[-1][1], said


def test_a_strength_runs_one_step_at_least(loaded: Callable[..., Any], tmp_path: Path) -> None:
    picture().save(tmp_path / "start.png")
    pipeline, start = loaded("turbo", "img2img"), tmp_path / "start.png"
    facts, said = draw(pipeline, image=start, strength=0.2)
    assert (facts["steps"], pipeline.num_timesteps) == (5, 1)
    assert said == ["5 steps are planned, so that one runs at this strength."]
    facts, said = draw(pipeline, image=start, strength=0.5)
    assert (facts["steps"], pipeline.num_timesteps, said) == (4, 2, [])
    facts, _ = draw(pipeline, image=start, strength=1.0, steps=1)
    assert (facts["steps"], pipeline.num_timesteps) == (1, 1)
    with pytest.raises(SpecError, match=r"--strength 0\.2 of 2 steps runs none"):
        draw(pipeline, image=start, strength=0.2, steps=2)


def test_a_negative_prompt_that_nothing_compares_with_is_said(loaded: Callable[..., Any]) -> None:
    wanted = "The negative prompt has no effect: it needs guidance of more than 1"
    for name in ("turbo", "lcm"):
        _, said = draw(loaded(name), negative_prompt="blue", steps=1)
        assert len(said) == 1
        assert said[0].startswith(wanted)
    assert draw(loaded("turbo"), negative_prompt="blue", steps=1, guidance=2.0)[1] == []


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ({"steps": 51}, "--steps 51 is more than the 50 that this model's scheduler has: use "),
        ({"steps": 51}, "use --steps 50 or fewer."),
        ({"scheduler": "euler"}, "--scheduler euler can't be used with this bundle's LatentConsi"),
        ({"scheduler": "ddim"}, "leave it out, or use --scheduler lcm."),
    ],
    ids=str,
)
def test_what_a_consistency_model_cannot_do_is_refused(
    loaded: Callable[..., Any], what: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SpecError) as caught:
        draw(loaded("lcm"), **what)
    assert sentence in str(caught.value)
    assert type(loaded("lcm").scheduler) is diffusers.LCMScheduler


def test_a_consistency_model_has_fewer_steps_at_less_strength(
    loaded: Callable[..., Any], tmp_path: Path
) -> None:
    picture().save(tmp_path / "start.png")
    pipeline, start = loaded("lcm", "img2img"), tmp_path / "start.png"
    assert draw(pipeline, image=start, strength=0.1)[0]["steps"] == pipeline.num_timesteps == 4
    with pytest.raises(SpecError) as caught:
        draw(pipeline, image=start, strength=0.05)
    assert str(caught.value) == (
        "--steps 4 is more than the 2 that this model's scheduler has at --strength 0.05: use "
        "--steps 2 or fewer."
    )
    with pytest.raises(SpecError, match=r"has at --strength 0\.01: use more --strength\."):
        draw(pipeline, image=start, strength=0.01)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_where_steps_lie_outlasts_another_scheduler(name: str) -> None:
    own = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", beta_end=0.012)
    pipeline = _Plain(own)
    with_scheduler(pipeline, name)
    config = pipeline.scheduler.config
    assert (config.timestep_spacing, config.beta_end) == ("trailing", 0.012)
    assert not config.get("clip_sample"), "latents aren't pixels"


def test_names_that_say_where_steps_lie_win() -> None:
    for name in ("euler_trailing", "ddim_trailing"):
        pipeline = _Plain(diffusers.EulerDiscreteScheduler(timestep_spacing="leading"))
        with_scheduler(pipeline, name)
        pipeline.scheduler.set_timesteps(4)
        assert pipeline.scheduler.timesteps.tolist() == [999, 749, 499, 249]


class _Plain:
    """A pipeline's scheduler alone."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __call__(self) -> None:
        raise AssertionError("never drawn with")


def test_an_exported_unet_gets_its_guidance_by_name() -> None:
    def unet(*given: object, **named: object) -> tuple[object]:
        return ((given, named),)

    module = torch.nn.Module()
    module.forward = unet  # type: ignore[method-assign]
    sample, step, states, guidance = (torch.full((1,), float(i)) for i in range(4))
    for others, named in (((states,), {}), ((guidance, states), {"timestep_cond": guidance})):
        ((given, found),) = WRAPPERS["unet_timestep"](module)(sample, step, *others)
        assert given == (sample, step, states)
        assert found == {**named, "return_dict": False}


@pytest.mark.parametrize("width", [None, 24], ids=["plain", "guided"])
def test_sdxls_unet_is_wrapped_by_what_it_takes(width: int | None) -> None:
    """The wrapper's inputs, in the signature's order, are the UNet's own numbers."""
    generator = torch.Generator().manual_seed(0)
    module = tiny_unet_xl(time_cond_proj_dim=width).eval()
    given: dict[str, Any] = {
        "sample": torch.randn((2, 4, 16, 16), generator=generator),
        "timestep": torch.tensor(499),
        "encoder_hidden_states": torch.randn((2, 7, 64), generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn((2, 32), generator=generator),
            "time_ids": torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 2),
        },
    }
    if width is not None:
        given["timestep_cond"] = torch.randn((2, width), generator=generator)
    names = ["sample", "time_features", "encoder_hidden_states", "text_embeds", "size_features"]
    if width is not None:
        names.insert(2, "timestep_cond")
    with torch.no_grad():
        wanted = module(**given, return_dict=False)[0]
        feeds = FEEDS["unet"](module.config, given)
        (found,) = WRAPPERS["unet"](module)(*(feeds[name] for name in names))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
