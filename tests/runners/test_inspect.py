from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Kiln = Callable[..., Any]
MakeBundle = Callable[..., Path]


def test_a_bundle_is_described_in_words(kiln: Kiln, bundle: MakeBundle) -> None:
    ended = kiln("inspect", bundle("openvino"))
    assert ended.code == 0
    for words in ("tiny (sd1, StableDiffusionPipeline)", "32 to 128 px in steps of 8, native 64"):
        assert words in ended.out
    for component in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        assert component in ended.out


def test_json_is_the_manifest_in_one_line(kiln: Kiln, bundle: MakeBundle) -> None:
    ended = kiln("inspect", bundle("openvino"), "--json")
    [line] = ended.out.splitlines()
    assert json.loads(line) == json.loads((bundle("openvino") / "manifest.json").read_bytes())


def test_a_recipe_is_complete_and_names_no_path(kiln: Kiln, bundle: MakeBundle) -> None:
    ended = kiln("inspect", bundle("openvino"), "--recipe")
    recipe = json.loads(ended.out)
    assert recipe["model"] == "tiny"
    absent = {name for name, value in recipe.items() if value is None}
    wishes_of_auto = {"budget", "min_quality", "policy"}
    another_vae = {"vae", "vae_revision", "vae_digest"}
    wishes = {"calibration", "calibration_size", "few_step", "prediction_type", "target"}
    wishes |= {"text_quant"}
    assert absent == {"revision", *wishes, *wishes_of_auto, *another_vae}
    assert (recipe["quant"], recipe["dtype"], recipe["backend"]) == ("none", "fp32", "openvino")
