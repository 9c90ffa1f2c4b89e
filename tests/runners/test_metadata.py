from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runners.metadata import parameters_text, read_metadata, save_picture

FACTS: dict[str, Any] = {
    "prompt": "a fox, (red:1.2), looking at: you",
    "negative_prompt": "blurry, low quality",
    "steps": 20,
    "guidance": 7.5,
    "seed": 4294967296,
    "width": 512,
    "height": 768,
    "scheduler": "EulerDiscreteScheduler",
    "model": "tiny",
    "model_digest": "0123456789abcdef" * 4,
    "bundle": "f" * 64,
    "kiln": "0.1.0",
}
_SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""A1111's own, modules/infotext_utils.py."""


def parsed(text: str) -> dict[str, str]:
    """What A1111's parse_generation_parameters makes of the text."""
    *lines, last = text.strip().split("\n")
    settings = _SETTING.findall(last)
    assert len(settings) >= 3, "A1111 takes a last line of fewer settings for a part of the prompt"
    prompt: list[str] = []
    negative: list[str] = []
    into = prompt
    for line in lines:
        if line.startswith("Negative prompt:"):
            into, line = negative, line.removeprefix("Negative prompt:")
        into.append(line.strip())
    found = {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative)}
    for name, value in settings:
        found[name] = json.loads(value) if value.startswith('"') else value
    return found


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"negative_prompt": ""},
        {"prompt": "two\nlines", "negative_prompt": "two\nmore"},
        {"prompt": ""},
        {"prompt": "un r\N{LATIN SMALL LETTER E WITH ACUTE}nard"},
        {"model": 'my model, v2: "final"'},
    ],
    ids=str,
)
def test_a1111_reads_the_parameters_back(change: dict[str, Any]) -> None:
    facts = {**FACTS, **change}
    found = parsed(parameters_text(facts))
    assert found["Prompt"] == facts["prompt"]
    assert found["Negative prompt"] == facts["negative_prompt"]
    assert found["Steps"] == "20"
    assert found["CFG scale"] == "7.5"
    assert found["Seed"] == "4294967296"
    assert found["Size"] == "512x768"
    assert found["Model"] == facts["model"]
    assert found["Model hash"] == "0123456789"
    assert found["Version"] == "kiln 0.1.0"


def test_what_a1111_has_a_word_for_is_in_its_text() -> None:
    assert not {"Denoising strength", "Clip skip"} & set(parsed(parameters_text(FACTS)))
    found = parsed(parameters_text({**FACTS, "strength": 0.6, "clip_skip": 2, "mask": "m.png"}))
    assert (found["Denoising strength"], found["Clip skip"]) == ("0.6", "2")
    assert found["Version"] == "kiln 0.1.0"


def test_a_picture_carries_both_chunks_and_its_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    save_picture(image, path, FACTS)
    assert read_metadata(path) == FACTS
    with Image.open(path) as saved:
        assert saved.info["parameters"] == parameters_text(FACTS)
        assert saved.tobytes() == image.tobytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError, match=r"a\.png"):
        save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.png", FACTS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_another_programs_picture_has_no_metadata_of_ours(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.png") == {}
