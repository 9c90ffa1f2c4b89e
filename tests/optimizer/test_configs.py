"""Configs that lack a key or have a wrong one: a sentence with file and key, for every family."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimizer.compile import plan_recipe
from optimizer.configs import DEFAULTS, KINDS, Config
from optimizer.plan import make_plan
from optimizer.recipe import Recipe
from optimizer.source import ModelSource
from profiles import hardware, profile
from profiles.errors import SpecError
from tests.tiny_pipelines import TINY

Kiln = Callable[..., Any]
REMOVED = object()


@pytest.fixture(scope="module", params=TINY)
def planned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's tiny pipeline, planned."""
    folder = TINY[request.param](tmp_path_factory.mktemp("configs") / request.param)
    return plan_recipe(Recipe(model=str(folder), backend="onnxruntime"))[0]


def plan_with(planned: Any, config_of: Callable[[ModelSource, str], Config]) -> None:
    """Plan again with other configs; nothing is read but the weights' headers."""
    machine = hardware.detect()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelSource, "checked_config", config_of)
        make_plan(planned.recipe, planned.source, profile=profile.match(machine), hardware=machine)


def read_keys(planned: Any) -> set[tuple[str, str]]:
    """Every folder and key that planning reads."""
    seen: set[tuple[str, str]] = set()

    class Spy(Config):
        folder: str

        def __getitem__(self, key: str) -> Any:
            seen.add((self.folder, key))
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            seen.add((self.folder, key))
            return super().get(key, default)

    original = ModelSource.checked_config

    def spied(source: ModelSource, name: str) -> Config:
        spy = Spy(original(source, name).document, Path(name))
        spy.folder = name
        return spy

    plan_with(planned, spied)
    return seen


def test_every_key_that_a_family_reads_has_a_kind(planned: Any) -> None:
    keys = read_keys(planned)
    assert {key for _, key in keys} <= set(KINDS)
    assert {folder for folder, _ in keys} == {spec.folder for spec in planned.family.components}


@pytest.mark.parametrize(
    "value", [REMOVED, None, "32", -3, 0.5, True, [], {}, ["32"]], ids=lambda v: type(v).__name__
)
def test_a_key_that_is_missing_or_wrong_is_named_with_its_file(planned: Any, value: Any) -> None:
    said = {at: sentence_of(planned, *at, value) for at in sorted(read_keys(planned))}
    refused = {at: sentence for at, sentence in said.items() if sentence is not None}
    assert len(refused) > 3
    for (folder, key), sentence in refused.items():
        if (folder, key) == ("vae", "_class_name"):
            unknown = "which can't be a VAE here: give an AutoencoderKL or" in sentence
            assert unknown or 'for "_class_name", which should be a name' in sentence
            continue
        assert f"{folder}/config.json has " in sentence or "don't fit together" in sentence
        assert f'"{key}"' in sentence or "don't fit together" in sentence
        assert "download the model again" in sentence or "download it again" in sentence


def sentence_of(planned: Any, folder: str, key: str, value: Any) -> str | None:
    """What planning says of a config with another value, None where it takes it."""
    original = ModelSource.checked_config

    def spoiled(source: ModelSource, name: str) -> Config:
        document = dict(original(source, name).document)
        if name == folder:
            document.pop(key, None)
            document |= {} if value is REMOVED else {key: value}
        return Config(document, Path(name) / "config.json")

    try:
        plan_with(planned, spoiled)
    except SpecError as error:
        return str(error)
    return None


def test_defaults_are_the_libraries_own() -> None:
    import diffusers
    import transformers

    for name, defaults in DEFAULTS.items():
        cls = getattr(diffusers, name, None)
        if cls is None:
            known: dict[str, Any] = transformers.AutoConfig.for_model(name).to_dict()
        else:
            parameters = inspect.signature(cls.__init__).parameters.values()
            known = {parameter.name: parameter.default for parameter in parameters}
        found = {key: known[key] for key in defaults}
        assert json.loads(json.dumps(found)) == defaults


def test_a_default_is_used_where_a_config_leaves_it_out() -> None:
    config = Config({"model_type": "clip_text_model", "hidden_size": 768}, Path("config.json"))
    assert (config["hidden_size"], config["max_position_embeddings"]) == (768, 77)
    assert config.document["max_position_embeddings"] == 77
    flux = Config({"_class_name": "FluxTransformer2DModel"}, Path("config.json"))
    assert flux["out_channels"] is None
    assert config.get("architectures", "none") == "none"


@pytest.mark.parametrize(
    ("file", "key", "value", "words"),
    [
        ("unet/config.json", "cross_attention_dim", REMOVED, 'has no "cross_attention_dim", which'),
        ("vae/config.json", "block_out_channels", REMOVED, 'has no "block_out_channels", which'),
        (
            "unet/config.json",
            "sample_size",
            "64",
            'has "64" for "sample_size", which should be a whole number of 1 or more: download',
        ),
        ("kiln.json", "steps", 0, 'has 0 for "steps", which should be a whole number from 1 to'),
        ("kiln.json", "guidance", "7", 'has "7" for "guidance", which should be a number of 0'),
    ],
)
def test_the_command_says_it_in_one_sentence(
    kiln: Kiln, tiny_model: Path, tmp_path: Path, file: str, key: str, value: Any, words: str
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    path = model / file
    document = json.loads(path.read_text()) if path.exists() else {}
    document.pop(key, None)
    path.write_text(json.dumps(document if value is REMOVED else {**document, key: value}))
    ended = kiln("compile", model, "--dry-run")
    assert ended.code == 2
    assert ended.sentence.startswith(f"Error: {path} {words}")


def test_a_damaged_kiln_json_is_said(kiln: Kiln, tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "kiln.json").write_text("{")
    ended = kiln("compile", model, "--dry-run")
    assert ended.code == 2
    assert "kiln.json is damaged" in ended.sentence


def test_weights_of_another_shape_than_the_config_says_are_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    """transformers takes 77 for a length that is left out, and the tiny encoder has 32."""
    from optimizer.load import load_module
    from optimizer.source import resolve

    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    path = model / "text_encoder" / "config.json"
    document = json.loads(path.read_text())
    del document["max_position_embeddings"]
    path.write_text(json.dumps(document))
    with pytest.raises(SpecError) as caught:
        load_module(resolve(str(model)), "text_encoder")
    assert str(caught.value).startswith(
        f"{path.parent} has tensors of another shape than its config.json says (1, the first is "
    )
    assert "position_embedding.weight: [32, 32] instead of [77, 32])" in str(caught.value)
