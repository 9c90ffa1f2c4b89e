"""The reference model's grammar and drawings, and the folder that is committed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPTokenizer

from benchmarks.reference_model.adherence import ATTRIBUTES, Adherence
from benchmarks.reference_model.captions import (
    BACKGROUND_KINDS,
    PHRASINGS,
    RGB,
    Background,
    Scene,
    Thing,
    caption_of,
    parse_caption,
    sample_scenes,
)
from benchmarks.reference_model.draw import CENTRES, draw_scene
from benchmarks.reference_model.evaluate import (
    MODEL,
    captions_of,
    drawn,
    generate,
    load_pipeline,
    table,
)
from profiles.errors import SpecError

SIZE_LIMIT = 24_000_000


@pytest.fixture(scope="module")
def adherence() -> Adherence:
    return Adherence.load(MODEL)


@pytest.mark.parametrize("phrasing", range(PHRASINGS))
def test_a_caption_reads_back_as_its_scene(phrasing: int) -> None:
    for scene in sample_scenes(5, 100, held_out=False):
        again = parse_caption(caption_of(scene, phrasing))
        assert again.background == scene.background
        assert set(again.things) == set(scene.things)
        assert again.held_out == scene.held_out


def test_a_scene_is_said_as_documented() -> None:
    scene = Scene(
        (
            Thing("circle", "red", "large", "on the left"),
            Thing("square", "green", "small", "at the top right"),
        ),
        Background("striped", ("white", "blue"), "vertical"),
    )
    assert caption_of(scene) == (
        "a large red circle on the left and a small green square at the top right, "
        "on vertical white and blue stripes"
    )


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "a large red circle on the left",
        "a large red circle on the left, on a plain tartan background",
        "a huge red circle on the left, on a plain white background",
    ],
)
def test_a_caption_outside_the_grammar_is_refused_with_an_example(caption: str) -> None:
    with pytest.raises(SpecError, match="legal captions read like 'a "):
        parse_caption(caption)


def test_held_out_scenes_are_rare_and_never_trained_on() -> None:
    assert not any(scene.held_out for scene in sample_scenes(1, 200, held_out=False))
    assert all(scene.held_out for scene in sample_scenes(3, 5, held_out=True))


def test_every_kind_of_background_is_drawn_and_a_seed_repeats_a_picture() -> None:
    scenes = sample_scenes(6, 60, held_out=False)
    assert {scene.background.kind for scene in scenes} == set(BACKGROUND_KINDS)
    for seed, scene in enumerate(scenes):
        picture = draw_scene(scene, seed)
        assert picture.shape == (64, 64, 3)
        assert np.array_equal(picture, draw_scene(scene, seed))


def test_a_thing_has_its_colour_at_its_position() -> None:
    for scene in sample_scenes(7, 60, held_out=False):
        picture = draw_scene(scene, 0)
        for thing in scene.things:
            if thing.shape in ("ring", "heart", "triangle"):
                continue
            pixel = picture[int(CENTRES[thing.cell // 3]), int(CENTRES[thing.cell % 3])]
            assert np.abs(pixel - np.asarray(RGB[thing.colour], float)).max() < 20, scene


def test_the_folder_is_small_enough_to_commit() -> None:
    assert sum(p.stat().st_size for p in MODEL.rglob("*") if p.is_file()) <= SIZE_LIMIT


def test_evaluation_captions_are_held_out_and_disjoint_from_calibration() -> None:
    calibration = captions_of(MODEL, "calibration")
    evaluation = captions_of(MODEL)
    assert len(calibration) >= 64
    assert len(set(evaluation)) == 200
    assert not set(calibration) & set(evaluation)
    assert all(parse_caption(caption).held_out for caption in evaluation)
    assert not any(parse_caption(caption).held_out for caption in calibration)


def test_every_word_is_one_token_and_any_text_is_accepted() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    assert tokenizer.model_max_length == 32
    for caption in captions_of(MODEL):
        words = caption.replace(",", " ,").split()
        assert len(tokenizer(caption)["input_ids"]) == len(words) + 2 <= 32
    assert tokenizer.unk_token_id not in tokenizer("Zebra Ünïcode 日本")["input_ids"][:-1]


def test_the_measure_recognizes_drawn_pictures(adherence: Adherence) -> None:
    captions = captions_of(MODEL)
    score = adherence.score(drawn(captions), captions)
    assert set(score.attributes) == set(ATTRIBUTES)
    assert len(score.per_image) == 200
    assert score.mean >= 0.98
    assert "| mean |" in table({"drawn": score})


def test_the_measure_rejects_the_wrong_pictures(adherence: Adherence) -> None:
    captions = captions_of(MODEL)
    shifted = captions[1:] + captions[:1]
    assert adherence.score(drawn(captions), shifted).mean < 0.5


def test_the_measure_wants_one_caption_for_each_picture(adherence: Adherence) -> None:
    with pytest.raises(SpecError, match="1 pictures and 0 captions"):
        adherence.score([Image.new("RGB", (64, 64))], [])
    with pytest.raises(SpecError, match="cannot read the caption"):
        adherence.score([Image.new("RGB", (64, 64))], ["a dog"])


def test_generated_pictures_show_their_captions(adherence: Adherence) -> None:
    settings = json.loads((MODEL / "kiln.json").read_text())
    captions = captions_of(MODEL)[:6]
    pipeline = load_pipeline(MODEL, "cpu")
    images = generate(pipeline, captions, steps=10, guidance=settings["guidance"])
    assert images[0].size == (64, 64)
    assert adherence.score(images, captions).mean > 0.75


def test_the_sample_sheet_is_small() -> None:
    sheet = Path(MODEL).with_name("samples.png")
    assert sheet.stat().st_size < 700_000
