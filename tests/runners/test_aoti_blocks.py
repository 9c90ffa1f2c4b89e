"""Blocks found, called and replaced; what compiles them is replaced by running them in eager."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from optimizer.backends import How
from optimizer.backends.aoti import sized_inputs, typed_module
from optimizer.backends.aoti_blocks import Kind, _Functional, find_kinds, watch_calls
from optimizer.quantize.apply import quantized_layer
from optimizer.quantize.schemes import W4A16
from profiles.errors import BundleError
from runners.engines.aoti_blocks import insert_blocks
from runners.engines.eager import eager_state
from runners.lowered import processor_product
from runners.quantized import insert_quantized
from runners.signature import Dim, Signature, TensorSpec

CONFIG: dict[str, Any] = {
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "in_channels": 16,
    "joint_attention_dim": 32,
    "num_attention_heads": 2,
    "num_layers": 2,
    "num_single_layers": 3,
    "pooled_projection_dim": 16,
}


def spec(name: str, *axes: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", axes=axes)


SIGNATURE = Signature(
    inputs=(
        spec("hidden_states", "batch", "sequence", 16),
        spec("encoder_hidden_states", "batch", "tokens", 32),
        spec("pooled_projections", "batch", 16),
        spec("time_features", "batch", 256),
        spec("img_rope", "sequence", 32),
        spec("txt_rope", "tokens", 32),
    ),
    outputs=(spec("out", "batch", "sequence", 16),),
    dims=(
        Dim(name="batch", min=1, opt=1, max=4),
        Dim(name="sequence", min=4, opt=16, max=64),
        Dim(name="tokens", min=4, opt=8, max=16),
    ),
)


class Eager:
    """In a package's place: the block of another module, with the weights that it is given."""

    def __init__(self, block: nn.Module, kind: Kind) -> None:
        self.run, self.calls = _Functional(block, kind), 0

    def hold_own(self) -> None: ...

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        self.calls += 1
        return list(self.run(*inputs))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny FLUX as the compile pipeline stores it, a linear of one kind of block in 4 bits."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    component = FluxTransformer2DModel(**CONFIG).eval()
    names = [f"single_transformer_blocks.{i}.proj_mlp" for i in range(3)]
    scheme = W4A16(group=32)
    rounded = {n: quantized_layer(n, component.get_submodule(n), scheme, {}) for n in names}  # type: ignore[arg-type]
    insert_quantized(component, rounded)
    layers, state = eager_state(component)
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    (tmp_path / "layers.json").write_text(json.dumps(layers))
    config = {**component.config, "_class_name": "FluxTransformer2DModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def typed_of(source: Path) -> nn.Module:
    how = How("aoti-blocks", "fp32", "denoiser", "flux_transformer", SIGNATURE)
    return typed_module(source, how, processor_product)[0]


@pytest.fixture
def watched(source: Path) -> tuple[nn.Module, list[Kind]]:
    typed = typed_of(source)
    kinds = find_kinds(typed)
    watch_calls(typed, kinds, SIGNATURE)
    return typed, kinds


def test_blocks_of_a_kind_are_found_by_their_classes_own_list(
    watched: tuple[nn.Module, list[Kind]],
) -> None:
    _, kinds = watched
    assert [len(kind.blocks) for kind in kinds] == [2, 3]
    assert kinds[1].weights["proj_mlp.codes"] == ["uint8", [128 * 32 // 2]]
    assert all(len(kind.calls) == 2 for kind in kinds)


def test_a_component_without_repeated_blocks_is_one_block() -> None:
    class Holder(nn.Module):
        wrapper: nn.Module

    holder = Holder()
    holder.wrapper = nn.Sequential(nn.Linear(3, 3))
    (kind,) = find_kinds(holder)
    assert kind.blocks == [""]


def test_packages_of_two_blocks_give_what_five_blocks_gave(
    source: Path, watched: tuple[nn.Module, list[Kind]]
) -> None:
    """With each block's own weights, at sizes that were never seen."""
    typed, kinds = watched
    other = typed_of(source).wrapper
    assert isinstance(other, nn.Module)
    packages = [Eager(other.get_submodule(kind.blocks[0]), kind) for kind in kinds]
    inputs = sized_inputs(SIGNATURE, {"batch": 2, "sequence": 10, "tokens": 5})
    with torch.no_grad():
        wanted = typed(*inputs)[0]
        wrapper = typed.wrapper
        assert isinstance(wrapper, nn.Module)
        documents = json.loads(json.dumps([kind.document("package") for kind in kinds]))
        insert_blocks(wrapper, documents, packages)  # type: ignore[arg-type]
        torch.testing.assert_close(typed(*inputs)[0], wanted)
    assert [package.calls for package in packages] == [2, 3]


def test_a_weight_of_another_shape_is_refused(watched: tuple[nn.Module, list[Kind]]) -> None:
    typed, kinds = watched
    kinds[0].weights["norm1.linear.bias"] = ["float32", [7]]
    wrapper = typed.wrapper
    assert isinstance(wrapper, nn.Module)
    package = Eager(wrapper.get_submodule(kinds[0].blocks[0]), kinds[0])
    with pytest.raises(BundleError, match=r"norm1\.linear\.bias isn't what its package needs"):
        insert_blocks(wrapper, [kinds[0].document("package")], [package])  # type: ignore[list-item]


def test_a_block_that_is_called_otherwise_is_refused(
    watched: tuple[nn.Module, list[Kind]],
) -> None:
    typed, kinds = watched
    wrapper = typed.wrapper
    assert isinstance(wrapper, nn.Module)
    kind = kinds[0]
    package = Eager(wrapper.get_submodule(kind.blocks[0]), kind)
    insert_blocks(wrapper, [kind.document("package")], [package])  # type: ignore[list-item]
    with pytest.raises(BundleError, match="calls its blocks otherwise"):
        wrapper.get_submodule(kind.blocks[0])(torch.zeros(1))
