"""What --control says, and the map that canny makes; nothing here needs torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from profiles.errors import SpecError
from runners.control_options import PREPROCESSORS, Control, parse_control
from runners.control_tasks import control_task, plain_task
from runners.preprocessing import MAPS, canny


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.png", Control(Path("a.png"))),
        ("a.png:0.5", Control(Path("a.png"), weight=0.5)),
        ("a.png:-1.5:0.25-1", Control(Path("a.png"), weight=-1.5, start=0.25)),
        ("canny:a b.png:2", Control(Path("a b.png"), "canny", 2.0)),
        ("controlnet_2=canny:a.png", Control(Path("a.png"), "canny", network="controlnet_2")),
        (r"canny:C:\maps\a.png:1:0-0.5", Control(Path(r"C:\maps\a.png"), "canny", end=0.5)),
        ("x=1.png", Control(Path("x=1.png"))),
        ("canny", Control(Path("canny"))),
    ],
)
def test_controls_are_read(text: str, wanted: Control) -> None:
    assert parse_control(text) == wanted


@pytest.mark.parametrize(
    "text",
    ["", ":1", "a.png:x", "a.png:inf", "a.png:1:2", "a.png:1:0.5-0.5", "a:1:0-1:2", "a.png:"],
)
def test_what_is_no_control_is_refused_with_the_way_to_write_it(text: str) -> None:
    with pytest.raises(SpecError, match="--control"):
        parse_control(text)


def test_tasks_are_the_plain_ones_with_control() -> None:
    for task in ("text-to-image", "img2img", "inpaint"):
        assert plain_task(control_task(task)) == task


def test_every_preprocessor_that_may_be_named_is_there() -> None:
    assert tuple(MAPS) == PREPROCESSORS


def test_canny_draws_the_outline_of_a_square() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[8:24, 8:24] = 200
    edges = np.asarray(canny(Image.fromarray(pixels)))
    assert edges.shape == (32, 32, 3)
    assert set(np.unique(edges)) == {0, 255}
    assert edges[12:20, 6:10].any(axis=1).all(), "the left side isn't there"
    assert not edges[12:20, 12:20].any(), "the inside isn't empty"
