"""Control networks beside a model: what is refused in the plan, and what the engines take."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from optimizer.calls import traced_sizes, unseen_sizes
from optimizer.controlnet import with_controlnets
from optimizer.families.base import Ranges
from optimizer.families.controls import controlled_signature
from optimizer.families.sd1 import signatures
from optimizer.source import resolve
from profiles.errors import SpecError
from runners.signature import Signature
from tests.conftest import Kiln
from tests.optimizer.hub import Hub
from tests.optimizer.hub_server import COMMIT, MODEL, serve_model
from tests.tiny_pipelines import tiny_controlnet, tiny_sd, tiny_sd3, tiny_sdxl

_CONFIGS = {
    "text_encoder": {
        "max_position_embeddings": 32,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "projection_dim": 32,
    },
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [64, 128, 256],
        "layers_per_block": 2,
        "cross_attention_dim": 32,
    },
    "vae": {
        "block_out_channels": [16, 32, 32],
        "latent_channels": 4,
        "in_channels": 3,
        "out_channels": 3,
    },
}


@pytest.fixture(scope="module")
def controlled() -> Signature:
    found = signatures(_CONFIGS, Ranges(40, 64, 128, 2))
    return controlled_signature(found["unet"], _CONFIGS["unet"])


def test_every_skip_and_the_middle_have_a_residual_of_their_own_size(
    controlled: Signature,
) -> None:
    residuals = {s.name: s.axes for s in controlled.inputs if "residual" in s.name}
    assert len(residuals) == 3 * 3 + 1
    assert residuals["down_residual_0"] == ("batch", 64, "height", "width")
    assert residuals["down_residual_3"] == ("batch", 64, "height_2", "width_2")
    assert residuals["mid_residual"] == ("batch", 256, "height_4", "width_4")


def test_inner_sides_follow_from_the_latents_and_others_are_refused(
    controlled: Signature,
) -> None:
    for sizes in (traced_sizes(controlled), *unseen_sizes(controlled).values()):
        assert sizes["height_2"] == -(-sizes["height"] // 2)
        assert sizes["width_4"] == -(-sizes["width"] // 4)
    feeds = {
        spec.name: np.zeros([sizes.get(a, a) for a in spec.axes], np.float32)
        for spec in controlled.inputs
    }
    assert controlled.check(feeds)["height_2"] == sizes["height_2"]
    wrong = {
        name: array[:, :, :-1] if array.ndim == 4 and "residual" in name else array
        for name, array in feeds.items()
    }
    wrong["down_residual_0"] = feeds["down_residual_0"]
    wrong["down_residual_1"] = feeds["down_residual_1"]
    wrong["down_residual_2"] = feeds["down_residual_2"]
    with pytest.raises(SpecError, match="follows from height"):
        controlled.check(wrong)


def _changed(network: Path, target: Path, **values: object) -> Path:
    """A copy of the network whose config says something else."""
    target.mkdir()
    for path in network.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((network / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **values}))
    return target


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return tiny_controlnet(tmp_path_factory.mktemp("networks") / "net", tiny_model)


def test_the_plan_names_networks_and_refuses_what_does_not_fit(
    tiny_model: Path, network: Path, tmp_path: Path, kiln: Kiln
) -> None:
    plan = ("compile", tiny_model, "--quant", "none", "--dry-run", "--controlnet")
    ended = kiln(*plan, f"{network},{network}", "--json", "--backend", "onnxruntime")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert document["controlnets"] == [str(network)] * 2
    assert [c["name"] for c in document["components"]][-2:] == ["controlnet", "controlnet_2"]
    assert len(document["recipe"]["controlnet_digests"]) == 2

    wider = _changed(network, tmp_path / "wider", cross_attention_dim=768)
    flux = _changed(network, tmp_path / "flux", _class_name="FluxControlNetModel")
    coarse = _changed(
        network, tmp_path / "coarse", conditioning_embedding_out_channels=[8, 16, 16, 16]
    )
    pooled = _changed(network, tmp_path / "pooled", global_pool_conditions=True)
    for given, said in (
        (wider, "has cross_attention_dim 768 and this model's UNet has 32"),
        (flux, "is of class FluxControlNetModel, and kiln knows control networks of class"),
        (coarse, "takes 8 pixels a side of a latent and this model's VAE makes 4"),
        (pooled, "global_pool_conditions"),
        (tiny_model, "is no ControlNet: it has no config.json"),
        (tmp_path / "nowhere" / "x", "is no folder here and no hub id"),
        (f"{network},", "names nothing between two commas"),
    ):
        ended = kiln(*plan, given)
        assert ended.code == 2, given
        assert said in ended.sentence


def test_families_without_control_say_so(network: Path, tmp_path: Path, kiln: Kiln) -> None:
    plan = ("--quant", "none", "--dry-run", "--controlnet", network)
    ended = kiln("compile", tiny_sd3(tmp_path / "sd3"), *plan)
    assert ended.code == 10
    assert "takes no control networks here" in ended.sentence
    ended = kiln("compile", tiny_sdxl(tmp_path / "sdxl"), *plan)
    assert ended.code == 2
    assert "and this model's UNet has" in ended.sentence


def test_a_recipe_is_held_to_the_networks_that_it_was_made_for(
    tiny_model: Path, network: Path, tmp_path: Path, kiln: Kiln
) -> None:
    ended = kiln(
        *("compile", tiny_model, "--quant", "none", "--dry-run", "--json"),
        *("--controlnet", network, "--backend", "onnxruntime"),
    )
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(json.loads(ended.out)["recipe"]))
    assert kiln("compile", "--recipe", recipe, "--dry-run").code == 0
    document = json.loads(recipe.read_text())
    other = tiny_controlnet(tmp_path / "other", tiny_model, seed=9)
    recipe.write_text(json.dumps({**document, "controlnets": [str(other)]}))
    ended = kiln("compile", "--recipe", recipe, "--dry-run")
    assert ended.code == 2
    assert "isn't the control network that the recipe was made for" in ended.sentence


def test_an_inpainting_models_network_takes_the_latents_alone(
    tmp_path: Path, network: Path, kiln: Kiln
) -> None:
    model = tiny_sd(tmp_path / "paints", inpaints=True)
    ended = kiln(
        *("compile", model, "--quant", "none", "--dry-run", "--json"),
        *("--controlnet", network, "--backend", "onnxruntime"),
    )
    assert ended.code == 0, ended.err


def test_of_a_hub_id_only_what_is_needed_is_fetched(
    tiny_model: Path, network: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(network, tmp_path / "hub"))
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "README.md").write_text("not the weights")
    how = ("compile", str(tiny_model), "--quant", "none", "--dry-run", "--json", "--controlnet")
    with serve_model(folder) as served:
        hub = Hub(served, tmp_path / "cache")
        code, out, err = hub.kiln(*how, f"{MODEL},{network}")
        assert code == 0, err
        assert set(hub.downloads) == {"config.json", "diffusion_pytorch_model.safetensors"}
        recipe = json.loads(out)["recipe"]
        assert recipe["controlnets"] == [f"{MODEL}@{COMMIT}", str(network)]
        assert len(set(recipe["controlnet_digests"])) == 1, "the folder holds the same files"

        del hub.downloads[:]
        for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
            code, out, err = hub.kiln(*how, f"{MODEL}@{COMMIT},{network}", **environment)
            assert code == 0, err
            assert json.loads(out)["recipe"] == recipe
        assert hub.downloads == []

        code, _, err = hub.kiln(*how, f"{MODEL}@v9")
        assert (code, "has no revision 'v9'" in err) == (2, True)


def test_networks_are_hashed_again_where_that_is_asked_for(
    tiny_model: Path, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noted(_: Path, *, always: bool) -> str:
        seen.append(always)
        return "0" * 64

    source = resolve(str(tiny_model))
    monkeypatch.setattr("optimizer.component_source.sha256_of", noted)
    for always in (False, True):
        with_controlnets(source, [str(network)], always_hash=always)
    assert seen == [False, False, True, True]
