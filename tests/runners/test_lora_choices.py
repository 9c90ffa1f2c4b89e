"""Which LoRAs are drawn with: options, tags in prompts, and what is refused of both."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiles.errors import SpecError
from runners.lora_choices import LoraChoice, choices_of, lora_folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("ink", "fog", "a b.c"):
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / "old.ckpt").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("weight", "value"), [("", 1.0), (":0.8", 0.8), (":-1", -1.0), (":2.5", 2.5), (":0", 0.0)]
)
def test_an_option_is_a_file_and_a_weight(folder: Path, weight: str, value: float) -> None:
    chosen, prompt = choices_of([f"{folder}/ink.safetensors{weight}"], "a cat", [])
    assert chosen == (LoraChoice(folder / "ink.safetensors", value),)
    assert prompt == "a cat"


def test_tags_are_looked_up_and_taken_out(folder: Path) -> None:
    text = "<lora:ink:0.5> a cat, <lora:a b.c:-1.5>sitting <lora:fog>"
    chosen, prompt = choices_of([], text, [folder / "..", folder])
    assert [(choice.name, choice.weight) for choice in chosen] == [
        ("ink", 0.5),
        ("a b.c", -1.5),
        ("fog", 1.0),
    ]
    assert prompt == "a cat, sitting"


@pytest.mark.parametrize("text", ["a  (cat:1.2) <b> lora:x", "<LORA:ink:1>", "", "<lora>"])
def test_other_text_stays_as_it_is(folder: Path, text: str) -> None:
    assert choices_of([], text, [folder]) == ((), text)


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        ("../ink", "never a path"),
        ("/etc/passwd", "never a path"),
        ("sub\\ink", "never a path"),
        (".hidden", "never a path"),
        ("..", "never a path"),
        ("", "never a path"),
        ("ink:strong", "no weight that is a number"),
        ("ink:nan", "no weight that is a number"),
        ("ink:1:2", "no weight that is a number"),
        ("inc", "did you mean ink?"),
        ("old", "has no old.safetensors"),
    ],
)
def test_tags_that_name_nothing_are_refused(folder: Path, tag: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        choices_of([], f"a cat <lora:{tag}>", [folder])
    assert said in str(caught.value)
    assert f"<lora:{tag}>" in str(caught.value)


def test_a_tag_needs_a_folder() -> None:
    with pytest.raises(SpecError, match="give --lora-dir DIR or set KILN_LORA_DIRS"):
        choices_of([], "<lora:ink:1>", [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("none.safetensors", "there is no such file"),
        ("none.safetensors:0.5", "there is no such file"),
        ("ink.safetensors:much", "much is no weight"),
        ("ink.safetensors:inf", "inf is no weight"),
        ("old.ckpt", "isn't a .safetensors file"),
        (":1", "there is no such file"),
    ],
)
def test_options_that_are_no_lora_are_refused(folder: Path, text: str, said: str) -> None:
    given = text if text.startswith(":") else f"{folder}/{text}"
    with pytest.raises(SpecError) as caught:
        choices_of([given], "a cat", [])
    assert said in str(caught.value)


def test_one_file_twice_is_refused(folder: Path) -> None:
    with pytest.raises(SpecError, match="ink is given more than once"):
        choices_of([f"{folder}/ink.safetensors"], "<lora:ink:1>", [folder])


def test_folders_come_from_options_or_else_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILN_LORA_DIRS", str(folder))
    assert lora_folders([]) == [folder]
    assert lora_folders([folder.parent]) == [folder.parent]
    with pytest.raises(SpecError, match=r"--lora-dir .*nowhere is no folder"):
        lora_folders([folder / "nowhere"])
    monkeypatch.setenv("KILN_LORA_DIRS", str(folder / "nowhere"))
    with pytest.raises(SpecError, match=r"KILN_LORA_DIRS .*nowhere is no folder"):
        lora_folders([])
