"""Pictures of an unquantized bundle against the plain diffusers pipeline, seed for seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import runners
from profiles.errors import SpecError, UnsupportedError
from runners.adapters import TextEncoderAdapter
from runners.bundle import open_bundle
from runners.engines.base import Engine
from runners.pipeline import TASKS
from runners.requests import Request
from runners.schedulers import SCHEDULERS, with_scheduler
from runners.signature import Signature
from runners.workflows import pictures
from tests.conftest import HERE

pytestmark = pytest.mark.filterwarnings(
    # several of diffusers 0.42's schedulers hand torch tensors to numpy.array
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

MakeBundle = Callable[..., Path]
PROMPT, NEGATIVE = "a red circle", "blue"
LIMIT = 1
"""In 255: fp32 sums in another order move a picture by 1e-5, which crosses at most one rounding."""


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Any:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def loaded(bundle: MakeBundle) -> Iterator[Callable[..., Any]]:
    """`loaded(backend, task=...)`: the pipeline of an unquantized bundle, loaded once."""
    pipelines: dict[tuple[str, str], Any] = {}

    def get(backend: str, task: str = "text-to-image") -> Any:
        if (backend, task) not in pipelines:
            pipelines[backend, task] = runners.load(bundle(backend), task=task)
        return pipelines[backend, task]

    yield get
    for pipeline in pipelines.values():
        pipeline.kiln.close()


def drawn(pipeline: Any, **changes: Any) -> np.ndarray[Any, Any]:
    """Pictures [n, height, width, 3] as 0-255; one seed each."""
    arguments = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        **changes,
    }
    seeds = arguments.pop("seeds", [3])
    arguments["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    for name in ("prompt", "negative_prompt"):
        arguments[name] = [arguments[name]] * len(seeds)
    images = pipeline(**arguments).images
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def difference(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> int:
    assert first.shape == second.shape
    assert first.std() > 1, "a flat picture proves nothing"
    return int(np.abs(first - second).max())


@pytest.mark.parametrize(
    "how",
    [
        {"width": 64, "height": 64},
        {"width": 96, "height": 32, "seeds": [5, 6]},
        {"width": 128, "height": 128, "guidance_scale": 1.0},
    ],
    ids=["native", "wide-batch", "large-unguided"],
)
@pytest.mark.parametrize("backend", HERE)
def test_pictures_are_diffusers_own(
    loaded: Callable[..., Any], plain: Any, backend: str, how: dict[str, Any]
) -> None:
    assert difference(drawn(loaded(backend), **how), drawn(plain, **how)) <= LIMIT


@pytest.mark.parametrize("name", ["euler_a", "dpmpp_2m_karras"])
def test_pictures_are_diffusers_own_with_other_schedulers(
    loaded: Callable[..., Any], plain: Any, name: str
) -> None:
    ours = loaded("openvino")
    original = ours.scheduler
    try:
        with_scheduler(ours, name)
        theirs = diffusers.StableDiffusionPipeline.from_pipe(plain)
        with_scheduler(theirs, name)
        theirs.set_progress_bar_config(disable=True)
        assert difference(drawn(ours), drawn(theirs)) <= LIMIT
    finally:
        ours.scheduler = original


@pytest.mark.parametrize("backend", HERE)
def test_img2img_is_diffusers_own(loaded: Callable[..., Any], plain: Any, backend: str) -> None:
    rng = np.random.default_rng(0)
    start = Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    theirs = diffusers.StableDiffusionImg2ImgPipeline(**plain.components)
    theirs.set_progress_bar_config(disable=True)
    how = {"image": start, "strength": 0.6, "seeds": [3, 4]}
    ours = loaded(backend, "img2img")
    assert difference(drawn(ours, **how), drawn(theirs, **how)) <= LIMIT


def test_loading_gives_the_diffusers_class_of_the_task(loaded: Callable[..., Any]) -> None:
    for task, name in TASKS["StableDiffusionPipeline"].items():
        pipeline = loaded("openvino", task)
        assert type(pipeline) is getattr(diffusers, name)
        assert pipeline.kiln.manifest.model.family == "sd1"


def test_a_denoiser_is_called_as_in_diffusers(loaded: Callable[..., Any], plain: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn((2, 4, 16, 16), generator=generator)
    states = torch.randn((2, 32, 32), generator=generator)
    step = torch.tensor(401)
    for pipeline in (loaded("openvino"), loaded("eager")):
        with torch.no_grad():
            wanted = plain.unet(sample, step, encoder_hidden_states=states).sample
        given = pipeline.unet(sample, step, encoder_hidden_states=states)
        (bare,) = pipeline.unet(sample, step, encoder_hidden_states=states, return_dict=False)
        assert torch.equal(given.sample, bare)
        torch.testing.assert_close(bare, wanted, rtol=1e-3, atol=1e-4)


def test_what_an_engine_has_no_input_for_is_refused(loaded: Callable[..., Any]) -> None:
    pipeline = loaded("openvino")
    sample, states = torch.zeros(1, 4, 16, 16), torch.zeros(1, 32, 32)
    with pytest.raises(UnsupportedError, match="no input for timestep_cond"):
        pipeline.unet(sample, 1, states, timestep_cond=torch.zeros(1))
    with pytest.raises(UnsupportedError, match="no attention mask"):
        pipeline.text_encoder(
            torch.zeros(1, 32, dtype=torch.int64), attention_mask=torch.ones(1, 32)
        )


@pytest.mark.parametrize("backend", HERE)
def test_clip_skip_takes_an_earlier_layers_normed_state(
    loaded: Callable[..., Any], plain: Any, backend: str
) -> None:
    """transformers 5.23 has no `text_model` in CLIPTextModel, so diffusers' own fails in eager."""
    pipeline, encoder = loaded(backend), plain.text_encoder
    ids = pipeline.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        every = encoder(ids, output_hidden_states=True).hidden_states
        wanted = [encoder.final_layer_norm(state) for state in every]
    given = pipeline.text_encoder(ids, output_hidden_states=True)
    assert len(given.hidden_states) == len(wanted) == 3
    assert not torch.allclose(wanted[1], wanted[2], atol=0.1)
    for ours, theirs in zip(given.hidden_states, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    skipped = pipeline.encode_prompt(PROMPT, "cpu", 1, False, clip_skip=1)[0]
    torch.testing.assert_close(skipped, given.hidden_states[-2])


def test_an_engine_without_hidden_states_says_how_to_get_them(bundle: MakeBundle) -> None:
    opened = open_bundle(bundle("openvino"))
    entry = opened.manifest.component("text_encoder")
    kept = entry.signature.outputs[:2]
    engine = _Silent(entry.signature.model_copy(update={"outputs": kept}))
    adapter = TextEncoderAdapter(opened.json(entry.config), lambda: engine)
    ids = torch.zeros(1, 32, dtype=torch.int64)
    with engine:
        assert adapter(ids).hidden_states is None
        with pytest.raises(UnsupportedError, match="last hidden state only: compile the model"):
            adapter(ids, output_hidden_states=True)


class _Silent(Engine):
    """Gives zeros of [1, 1] for every output."""

    def __init__(self, signature: Signature) -> None:
        super().__init__({}, signature=signature, properties={}, threads=1)

    def _open(self) -> None:
        pass

    def _run(self, feeds: Any) -> dict[str, Any]:  # noqa: ARG002
        return {spec.name: np.zeros((1, 1), np.float32) for spec in self.signature.outputs}

    def _close(self) -> None:
        pass


@pytest.mark.parametrize("backend", HERE)
def test_the_same_seed_gives_the_same_picture(loaded: Callable[..., Any], backend: str) -> None:
    first, second = (drawn(loaded(backend)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert difference(first, drawn(loaded(backend), seeds=[4])) > LIMIT


def test_a_seed_means_the_same_picture_alone_and_in_a_batch(loaded: Callable[..., Any]) -> None:
    def make(batch: int) -> list[np.ndarray[Any, Any]]:
        request = Request(PROMPT, NEGATIVE, steps=4, guidance=5.0, seed=11, count=3, batch=batch)
        found = list(pictures(loaded("openvino"), request))
        assert [facts["seed"] for _, facts in found] == [11, 12, 13]
        return [np.asarray(image, dtype=np.int16) for image, _ in found]

    for alone, together in zip(make(1), make(2), strict=True):
        assert difference(alone, together) <= LIMIT


def test_a_prompt_longer_than_the_text_encoder_takes_is_cut(loaded: Callable[..., Any]) -> None:
    pipeline = loaded("openvino")
    assert pipeline.tokenizer.model_max_length == 32
    assert drawn(pipeline, prompt="a red circle, " * 40).shape == (1, 64, 64, 3)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_name_draws(loaded: Callable[..., Any], name: str) -> None:
    pipeline = loaded("openvino")
    original = pipeline.scheduler
    try:
        with_scheduler(pipeline, name)
        assert drawn(pipeline).shape == (1, 64, 64, 3)
        assert pipeline.scheduler.config.beta_schedule == "scaled_linear"
    finally:
        pipeline.scheduler = original


def test_an_unknown_scheduler_or_task_names_the_known_ones(
    loaded: Callable[..., Any], bundle: MakeBundle
) -> None:
    with pytest.raises(SpecError) as caught:
        with_scheduler(loaded("openvino"), "euler-a")
    assert str(caught.value).startswith("--scheduler euler-a is not known: use one of ddim, ")
    with pytest.raises(SpecError, match="use one of text-to-image, img2img, inpaint"):
        runners.load(bundle("openvino"), task="upscale")


def test_a_size_that_no_engine_was_compiled_for_names_the_nearest(
    loaded: Callable[..., Any],
) -> None:
    request = Request(PROMPT, steps=2, width=60, height=256)
    with pytest.raises(SpecError) as caught:
        list(pictures(loaded("openvino"), request))
    assert str(caught.value) == (
        "--size 60x256 is not among the sizes that the bundle was compiled for (sides of 32 to "
        "128 in steps of 8): use 64x128."
    )


def test_an_engine_opens_at_its_first_call(bundle: MakeBundle) -> None:
    pipeline = runners.load(bundle("onnxruntime"))
    assert not pipeline.kiln._open._engines
    drawn(pipeline)
    assert set(pipeline.kiln._open._engines) == {"text_encoder", "unet", "vae_decoder"}
    pipeline.kiln.close()
    assert not pipeline.kiln._open._engines
