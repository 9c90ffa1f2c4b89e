"""The reference model's ControlNet: what it is shown, and how its pictures are judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.reference_model.captions import parse_caption, sample_scenes
from benchmarks.reference_model.controlled import edges_of, found_shape, iou, open_caption, shape_of
from benchmarks.reference_model.draw import draw_before, draw_coverage, draw_scene
from benchmarks.reference_model.evaluate_control import held_out_scenes

_CAPTION = "a large red star on the left, on vertical white and blue stripes"


def test_captions_leave_size_shape_and_place_open() -> None:
    assert (
        open_caption(parse_caption(_CAPTION)) == "a red thing, on vertical white and blue stripes"
    )


def test_shapes_are_found_in_pictures_of_all_backgrounds() -> None:
    scenes = held_out_scenes(40)
    found = [
        iou(
            found_shape(draw_scene(scene, i), scene.things[0], scene.background), shape_of(scene, i)
        )
        for i, scene in enumerate(scenes)
    ]
    assert np.mean(found) > 0.9
    assert {scene.held_out for scene in scenes} == {True}


def test_edges_lie_where_the_picture_has_the_things() -> None:
    rng = np.random.default_rng(0)
    for seed, scene in enumerate(sample_scenes(1, 6, held_out=False)):
        covered, edges = draw_coverage(scene, seed), edges_of(scene, seed, rng)
        plain = draw_before(scene, seed, (128, 128, 128))
        assert set(np.unique(edges)) == {0, 255}
        # half a pixel of blur on each side
        near = np.pad(covered, 2).astype(bool)
        around = np.stack([near[y : y + 64, x : x + 64] for y in range(5) for x in range(5)]).any(
            axis=0
        )
        assert around[edges > 0].all()
        np.testing.assert_array_equal(plain[covered == 0], 128)


@pytest.mark.slow
def test_training_writes_a_network_that_fits(tmp_path: Path) -> None:
    from diffusers import ControlNetModel

    from benchmarks.reference_model.train_controlnet import main

    out = tmp_path / "net"
    options = ("--scenes", "8", "--steps", "2", "--batch", "2", "--device", "cpu")
    main([*options, "--work", str(tmp_path / "work"), "--out", str(out)])
    network = ControlNetModel.from_pretrained(out)
    assert network.config.conditioning_embedding_out_channels == [16, 32, 64]
    assert any(parameter.any() for parameter in network.controlnet_down_blocks.parameters())
