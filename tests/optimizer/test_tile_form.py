"""The two parts of a VAE's half: where they are planned, and what they take and give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from optimizer.compile import plan_recipe
from optimizer.describe import plan_text
from optimizer.plan import Plan
from optimizer.recipe import Recipe
from optimizer.tile_form import part_signatures
from optimizer.tile_graph import cut_before
from optimizer.vae_config import splits
from profiles.errors import BuildError
from runners.signature import Signature
from tests.tiny_pipelines import tiny_taesd


def _planned(model: Path, **fields: Any) -> Plan:
    return plan_recipe(Recipe.model_validate({"model": str(model), **fields}))[0]


def _forms(plan: Plan) -> set[tuple[str, ...]]:
    return {job.forms for job in plan.jobs if job.spec.role.startswith("vae")}


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "eager"])
def test_both_halves_are_cut_where_pictures_may_be_larger_than_a_tile(
    tiny_model: Path, backend: str
) -> None:
    plan = _planned(tiny_model, backend=backend)
    assert _forms(plan) == {("before", "after")}
    assert "tiles: seamless ones of 64 px" in plan_text(plan)


def test_nothing_is_cut_that_needn_t_be_or_can_t(tiny_model: Path, tmp_path: Path) -> None:
    small = _planned(tiny_model, size_max=64)
    assert _forms(small) == {()}
    assert "tiles: none, no picture is larger than one" in plan_text(small)
    without = _planned(tiny_model, tiles=False)
    assert _forms(without) == {()}
    assert "tiles: blended ones of 64 px, as --no-tiles says" in plan_text(without)
    other = _planned(tiny_model, vae=str(tiny_taesd(tmp_path / "taesd")))
    assert _forms(other) == {()}
    assert "the VAE's graphs can't be cut here" in plan_text(other)


def test_blocks_with_attention_are_not_cut() -> None:
    config = {"_class_name": "AutoencoderKL", "up_block_types": ["UpDecoderBlock2D"]}
    assert splits(config)
    assert not splits({**config, "down_block_types": ["AttnDownEncoderBlock2D"]})
    assert not splits({**config, "mid_block_add_attention": False})  # nothing to cut at


def _axes(signature: Signature) -> dict[str, tuple[int | str, ...]]:
    return {spec.name: spec.axes for spec in (*signature.inputs, *signature.outputs)}


def test_parts_take_and_give_what_the_half_does(tiny_model: Path) -> None:
    plan = _planned(tiny_model)
    config = {"block_out_channels": [16, 32, 32], "norm_num_groups": 8}
    jobs = {job.spec.role: job for job in plan.jobs}
    norms = {"before": 3, "after": 5}
    decoder, encoder = (
        part_signatures(jobs[role], config, norms=norms) for role in ("vae_decoder", "vae_encoder")
    )
    own = {"own": (1,)}
    before, after = (
        {**own, "given": (count, 2, 8), "seen": (count, 2, 8)} for count in norms.values()
    )
    sides = {"rows": ("height",), "columns": ("width",)}
    map_ = (1, 32, "height", "width")
    assert _axes(decoder["before"]) == {
        "latent": (1, 4, "height", "width"),
        **dict.fromkeys(("features", "query", "key", "value"), map_),
        **sides,
        **before,
    }
    assert _axes(decoder["after"]) == {
        **dict.fromkeys(("features", "attended"), map_),
        "image": (1, 3, "out_height", "out_width"),
        **sides,
        **after,
    }
    assert _axes(encoder["before"]) == {
        "image": (1, 3, "height", "width"),
        **dict.fromkeys(("features", "query", "key", "value"), (1, 32, "out_height", "out_width")),
        "rows": ("rows",),
        "columns": ("columns",),
        **before,
    }
    assert _axes(encoder["after"]) == {
        **dict.fromkeys(("features", "attended"), map_),
        "moments": (1, 8, "out_height", "out_width"),
        **sides,
        **after,
    }
    assert encoder["before"].dim("rows").following({"height": 64}) == 16
    assert (encoder["after"].dim("height").min, encoder["after"].dim("height").max) == (8, 64)


def test_a_graph_that_cannot_be_cut_is_named(tiny_model: Path) -> None:
    x = ir.val("latent", dtype=ir.DataType.FLOAT, shape=[1, 4, 8, 8])
    node = ir.node("Relu", [x])
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23})
    signature = _planned(tiny_model).jobs[0].signature
    with pytest.raises(BuildError, match=r"decoder has 0 attentions in its graph"):
        cut_before(ir.Model(graph, ir_version=10), "decoder", signature)
