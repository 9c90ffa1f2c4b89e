from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from profiles import gpu, profile

Kiln = Callable[..., Any]


def test_every_profile_and_card_is_listed_in_a_line(kiln: Kiln) -> None:
    ended = kiln("profiles")
    assert ended.code == 0
    first = [line.split(" ")[0] for line in ended.out.splitlines()]
    for name in (*profile.names(), *gpu.names()):
        assert first.count(name) == 1


def test_a_cards_line_has_its_numbers_and_blanks_for_what_it_lacks(kiln: Kiln) -> None:
    lines = {line.split(" ")[0]: line for line in kiln("profiles").out.splitlines()}
    head, ampere, blackwell = lines["card"], lines["rtx-3090"], lines["rtx-5090"]
    assert head.split()[1:8] == ["capability", "GiB", "GB/s", "fp16", "int8", "fp8", "fp4"]
    assert blackwell.split()[1:8] == ["12.0", "32", "1792", "209.5", "838.0", "419.0", "1676.0"]
    assert ampere.split()[1:6] == ["8.6", "24", "936", "71.2", "284.7"]
    assert {line.index("GeForce") for line in (ampere, blackwell)} == {head.index("description")}


def test_json_lists_everything_in_one_line(kiln: Kiln) -> None:
    [line] = kiln("profiles", "--json").out.splitlines()
    document = json.loads(line)
    assert [entry["name"] for entry in document["profiles"]] == list(profile.names())
    assert [entry["name"] for entry in document["cards"]] == list(gpu.names())
    [entry] = [entry for entry in document["cards"] if entry["name"] == "rtx-4090"]
    assert entry["formats"] == ["fp16", "bf16", "w8a8", "w8a16", "w4a16", "fp8"]


@pytest.mark.parametrize("name", ["rtx-4090", "h200-sxm", "generic", "nvidia-rtx"])
def test_one_is_shown_with_every_source(kiln: Kiln, name: str) -> None:
    ended = kiln("profiles", "show", name)
    assert ended.code == 0
    known: Any = gpu.load(name) if name in gpu.names() else profile.load(name)
    assert known.description in ended.out
    for label, source in known.sources.items():
        assert f"source of {label}: {source}" in ended.out


def test_a_card_is_shown_with_its_legal_and_its_fast_formats(kiln: Kiln) -> None:
    lines = kiln("profiles", "show", "rtx-4090").out.splitlines()
    assert "capability  8.9 (sm89)" in lines
    assert "formats     fp16, bf16, w8a8, w8a16, w4a16, fp8" in lines
    assert "fast        int8, fp8 (more operations a second than fp16)" in lines


@pytest.mark.parametrize(
    "arguments", [("show", "rtx-4090", "--json"), ("--json", "show", "rtx-4090")]
)
def test_json_shows_a_card_in_one_line(kiln: Kiln, arguments: tuple[str, ...]) -> None:
    [line] = kiln("profiles", *arguments).out.splitlines()
    document = json.loads(line)
    assert document["peak"]["fp8"] == 330.3
    assert document["fast"] == ["int8", "fp8"]


def test_json_shows_a_profile_in_one_line(kiln: Kiln) -> None:
    [line] = kiln("profiles", "show", "generic", "--json").out.splitlines()
    assert json.loads(line) == profile.load("generic").model_dump(mode="json")


def test_an_unknown_name_ends_with_2_and_the_nearest(kiln: Kiln) -> None:
    ended = kiln("profiles", "show", "rtx-490")
    assert (ended.code, ended.out) == (2, "")
    assert "called 'rtx-490' (nearest: rtx-4090" in ended.sentence
    assert "`kiln profiles` lists them all." in ended.sentence
    assert "(nearest: generic" in kiln("profiles", "show", "genric").sentence
