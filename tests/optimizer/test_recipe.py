from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optimizer.recipe import Recipe, checked, load_recipe
from profiles.errors import SpecError


def test_a_recipe_round_trips_through_a_file(tmp_path: Path) -> None:
    recipe = Recipe(model="m", quant="int8", dtype="bf16", size_min=32, size_max=64, steps=3)
    path = tmp_path / "recipe.json"
    path.write_text(recipe.model_dump_json())
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        (
            {"quant": "int3"},
            "--quant int3 is not known: use one of none, int8, int8w, ",
        ),
        (
            {"backend": "tvm"},
            "--backend tvm is not known: use one of openvino, onnxruntime, tensorrt-rtx, "
            "tensorrt, onnxruntime-cuda, aoti-cuda, aoti, aoti-blocks, eager.",
        ),
        ({"dtype": "fp8"}, "The recipe's dtype is wrong: Input should be 'auto', 'fp32', 'fp16' "),
        ({"batch": 0}, "The recipe's batch is wrong: Input should be greater than or equal to 1."),
        ({"steps": -4}, "The recipe's steps is wrong: Input should be greater than or equal to 1."),
        ({"size_min": 0}, "The recipe's size_min is wrong: "),
        (
            {"size_min": 64, "size_max": 32},
            "--size-range 64:32 is backwards: the smaller side first.",
        ),
        ({"colour": "red"}, "The recipe's colour is wrong: Extra inputs are not permitted."),
    ],
    ids=str,
)
def test_a_wrong_field_is_one_sentence(field: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError) as caught:
        checked({"model": "m", **field})
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "{", "[]", "null"])
def test_what_is_no_recipe_names_the_command_that_writes_one(
    tmp_path: Path, text: str | None
) -> None:
    path = tmp_path / "recipe.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpecError, match="is no recipe") as caught:
        load_recipe(path)
    assert "write one with `kiln inspect BUNDLE --recipe`" in str(caught.value)


def test_a_recipe_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"model": "m", "precision": "int8"}))
    with pytest.raises(SpecError, match="precision"):
        load_recipe(path)
