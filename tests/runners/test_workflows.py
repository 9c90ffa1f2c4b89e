"""Editing pictures on a bundle's engines, against diffusers' own pipelines and pixel for pixel."""

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
from profiles.errors import SpecError
from runners.requests import Request
from runners.workflows import pictures

MakeBundle = Callable[..., Path]
Pixels = np.ndarray[Any, Any]
PROMPT, NEGATIVE = "a red circle", "blue"
LIMIT = 1
"""In 255: fp32 sums in another order move a picture by 1e-5, which crosses at most one rounding."""


@pytest.fixture(scope="module")
def loaded(bundle: MakeBundle) -> Iterator[Callable[[str], Any]]:
    """`loaded(task)`: the pipeline of an unquantized bundle, loaded once."""
    pipelines: dict[str, Any] = {}

    def get(task: str) -> Any:
        if task not in pipelines:
            pipelines[task] = runners.load(bundle("openvino"), task=task, threads=1)
        return pipelines[task]

    yield get
    for pipeline in pipelines.values():
        pipeline.kiln.close()


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Path]:
    """A file of smooth random colours, width x height."""

    def make(width: int, height: int, name: str = "picture.png") -> Path:
        small = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        image.save(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def masked(tmp_path: Path) -> Callable[..., Path]:
    """A mask of width x height, white in a box."""

    def make(width: int, height: int, box: tuple[int, int, int, int]) -> Path:
        image = Image.new("L", (width, height))
        image.paste(255, box)
        image.save(tmp_path / "mask.png")
        return tmp_path / "mask.png"

    return make


def pixels_of(source: Path | Image.Image) -> Pixels:
    image = Image.open(source) if isinstance(source, Path) else source
    return np.asarray(image.convert("RGB"), dtype=np.int16)


def draw(
    loaded: Callable[[str], Any], **what: Any
) -> tuple[list[Pixels], dict[str, Any], list[str]]:
    """All pictures, the last one's facts, and what was said."""
    request = Request(PROMPT, NEGATIVE, **{"steps": 3, "guidance": 5.0, "seed": 3, **what})
    said: list[str] = []
    found = list(pictures(loaded(request.task), request, say=said.append))
    return [pixels_of(image) for image, _ in found], found[-1][1], said


def test_repainting_is_diffusers_own_where_the_mask_is(
    loaded: Callable[[str], Any],
    tiny_model: Path,
    picture: Callable[..., Path],
    masked: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runners.drawing.without_seam", lambda drawn, _canvas, _mask: drawn)
    start, mask = picture(96, 64), masked(96, 64, (16, 8, 64, 48))
    [ours], facts, said = draw(loaded, image=start, mask=mask, strength=0.7, steps=4)
    theirs = diffusers.StableDiffusionInpaintPipeline.from_pretrained(
        tiny_model, local_files_only=True
    )
    theirs.set_progress_bar_config(disable=True)
    [wanted] = theirs(
        PROMPT,
        Image.open(start),
        Image.open(mask),
        negative_prompt=NEGATIVE,
        width=96,
        height=64,
        strength=0.7,
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images
    inside = pixels_of(mask)[:, :, 0] == 255
    np.testing.assert_array_equal(ours[~inside], pixels_of(start)[~inside])
    assert np.abs(ours - pixels_of(wanted))[inside].max() <= LIMIT
    assert np.abs(ours - pixels_of(start))[inside].mean() > 5
    assert said == []
    assert (facts["mask"], facts["strength"], facts["steps"]) == ("mask.png", 0.7, 4)


@pytest.mark.parametrize(
    ("size", "box", "how"),
    [
        ((61, 75), (10, 11, 30, 33), {}),
        ((20, 24), (3, 4, 9, 9), {}),
        ((300, 40), (250, 3, 290, 31), {}),
        ((300, 200), (20, 20, 280, 180), {}),
        ((61, 75), (10, 11, 30, 33), {"width": 64, "height": 32}),
        ((61, 75), (60, 74, 61, 75), {"strength": 0.5}),
    ],
    ids=["odd", "small", "wide", "large", "size", "pixel"],
)
def test_pixels_that_are_not_masked_stay_as_they_are(
    loaded: Callable[[str], Any],
    picture: Callable[..., Path],
    masked: Callable[..., Path],
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    how: dict[str, Any],
) -> None:
    start, mask = picture(*size), masked(*size, box)
    [result], facts, said = draw(loaded, image=start, mask=mask, **how)
    inside = pixels_of(mask)[:, :, 0] == 255
    np.testing.assert_array_equal(result[~inside], pixels_of(start)[~inside])
    assert np.abs(result - pixels_of(start))[inside].max() > 0
    assert (facts["width"], facts["height"]) == size
    scaled = size in ((20, 24), (300, 200)) or "width" in how
    assert bool(said) == scaled
    assert all("scaled back; only what is repainted changes." in note for note in said)


@pytest.mark.parametrize("by", [(13, 0, 0, 0), (8, 16, 24, 32), (0, 0, 100, 0)], ids=str)
def test_outpainting_adds_pixels_and_touches_none(
    loaded: Callable[[str], Any], picture: Callable[..., Path], by: tuple[int, int, int, int]
) -> None:
    start = picture(61, 75)
    [result], facts, _ = draw(loaded, image=start, outpaint=by)
    left, top, right, bottom = by
    assert result.shape == (75 + top + bottom, 61 + left + right, 3)
    np.testing.assert_array_equal(result[top : top + 75, left : left + 61], pixels_of(start))
    assert facts["outpaint"] == list(by)
    assert (facts["width"], facts["height"]) == (result.shape[1], result.shape[0])


def test_outpainting_and_a_mask_go_together(
    loaded: Callable[[str], Any], picture: Callable[..., Path], masked: Callable[..., Path]
) -> None:
    start, mask = picture(48, 48), masked(48, 48, (0, 0, 16, 16))
    [result], facts, _ = draw(loaded, image=start, mask=mask, outpaint=(0, 0, 16, 0))
    kept = pixels_of(mask)[:, :, 0] == 0
    np.testing.assert_array_equal(result[:, :48][kept], pixels_of(start)[kept])
    assert np.abs(result[:16, :16] - pixels_of(start)[:16, :16]).max() > 0
    assert facts["mask"] == "mask.png"


@pytest.mark.parametrize(
    ("size", "how", "wanted", "note"),
    [
        ((61, 75), {}, (61, 75), ""),
        ((260, 130), {}, (128, 64), "picture.png (260x130) is drawn at 128x64."),
        ((61, 75), {"width": 96, "height": 32}, (96, 32), "picture.png (61x75) is drawn at 96x32."),
    ],
    ids=["odd", "large", "size"],
)
def test_an_image_is_drawn_at_its_own_size_where_that_is_possible(
    loaded: Callable[[str], Any],
    picture: Callable[..., Path],
    size: tuple[int, int],
    how: dict[str, Any],
    wanted: tuple[int, int],
    note: str,
) -> None:
    [result], facts, said = draw(loaded, image=picture(*size), strength=0.7, **how)
    assert result.shape == (wanted[1], wanted[0], 3)
    assert (facts["width"], facts["height"]) == wanted
    assert said == ([note] if note else [])


@pytest.mark.parametrize("task", ["img2img", "inpaint"])
def test_a_seed_means_the_same_edit_alone_and_in_a_batch(
    loaded: Callable[[str], Any],
    picture: Callable[..., Path],
    masked: Callable[..., Path],
    task: str,
) -> None:
    how: dict[str, Any] = {"image": picture(64, 64), "strength": 0.8, "count": 3}
    if task == "inpaint":
        how["mask"] = masked(64, 64, (0, 0, 40, 64))
    alone, together = (draw(loaded, **how, batch=batch)[0] for batch in (1, 2))
    assert len(alone) == len(together) == 3
    for first, second in zip(alone, together, strict=True):
        assert np.abs(first - second).max() <= LIMIT
    assert np.abs(alone[0] - alone[1]).max() > LIMIT


def test_a_strength_that_leaves_no_step_names_the_least(
    loaded: Callable[[str], Any], picture: Callable[..., Path]
) -> None:
    start = picture(64, 64)
    for strength, steps, least in ((0.3, 3, "0.34"), (0.0, 7, "0.15"), (0.01, 20, "0.05")):
        with pytest.raises(SpecError) as caught:
            draw(loaded, image=start, strength=strength, steps=steps)
        assert str(caught.value) == (
            f"--strength {strength:g} of {steps} steps runs none, so nothing would change: use "
            f"--strength {least} or more, or more --steps."
        )
        assert int(steps * float(least)) == 1


def test_without_a_strength_it_is_the_pipelines_own(
    loaded: Callable[[str], Any], picture: Callable[..., Path], masked: Callable[..., Path]
) -> None:
    start = picture(64, 64)
    assert draw(loaded, image=start)[1]["strength"] == 0.8
    assert draw(loaded, image=start, mask=masked(64, 64, (0, 0, 9, 9)))[1]["strength"] == 1.0


def test_clip_skip_counts_from_the_last_layer(loaded: Callable[[str], Any]) -> None:
    none, facts, _ = draw(loaded)
    assert "clip_skip" not in facts
    last, facts, _ = draw(loaded, clip_skip=1)
    assert facts["clip_skip"] == 1
    np.testing.assert_array_equal(last, none)
    earlier, _, _ = draw(loaded, clip_skip=2)
    assert np.abs(earlier[0] - none[0]).max() > LIMIT
    encoder, ids = loaded("text-to-image").text_encoder, torch.zeros((1, 32), dtype=torch.int64)
    states = encoder(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[-1], encoder(ids)[0])


def test_weights_and_a_cut_prompt_reach_the_picture(loaded: Callable[[str], Any]) -> None:
    task = loaded("text-to-image")
    images = []
    for prompt in ("a red circle", "a (red:3) circle"):
        request = Request(prompt, steps=2, guidance=5.0, seed=3)
        images += [pixels_of(image) for image, _ in pictures(task, request)]
    assert np.abs(images[0] - images[1]).max() > LIMIT
    said: list[str] = []
    [(_, facts)] = pictures(task, Request("a" * 100, steps=1, seed=3), say=said.append)
    assert facts["prompt_dropped"] == "a" * 10
    assert said == [
        "Warning: the prompt is longer than the 90 tokens that the bundle takes; "
        f'"{"a" * 10}" is left out.'
    ]
