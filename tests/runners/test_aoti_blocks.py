"""Blocks found, called and replaced; what compiles them is replaced by running them in eager."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from optimizer.backends import How, aoti_cuda
from optimizer.backends.aoti import FILES, Typed, exported, sized_inputs, typed_module
from optimizer.backends.aoti_blocks import Kind, _Functional, find_kinds, watch_calls
from optimizer.forms import prepared_forms
from optimizer.lora_form import prepare_lora
from optimizer.quantize.apply import quantized_layer
from optimizer.quantize.schemes import W4A16
from profiles.errors import BundleError
from runners.engines.aoti_blocks import insert_blocks
from runners.engines.aoti_cuda import AotiCudaEngine
from runners.engines.eager import EagerEngine, eager_state
from runners.lowered import processor_product
from runners.modules import WRAPPERS
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

    def __init__(self, block: nn.Module, kind: Kind, typed: Typed) -> None:
        self.run, self.calls = _Functional(block, kind, typed.low_rank), 0

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
    prepare_lora(component, SIGNATURE, tmp_path, with_graph=False)
    layers, state = eager_state(component)
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    (tmp_path / "layers.json").write_text(json.dumps(layers))
    config = {**component.config, "_class_name": "FluxTransformer2DModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def typed_of(source: Path, form: str = "") -> Typed:
    how = How("aoti-blocks", "fp32", "denoiser", "flux_transformer", SIGNATURE)
    return typed_module(source, how, processor_product, form, merging=True)[0]


@pytest.fixture
def watched(source: Path) -> tuple[Typed, list[Kind]]:
    typed = typed_of(source)
    kinds = find_kinds(typed)
    watch_calls(typed, kinds, SIGNATURE)
    return typed, kinds


def test_blocks_of_a_kind_are_found_by_their_classes_own_list(
    watched: tuple[Typed, list[Kind]],
) -> None:
    _, kinds = watched
    assert [len(kind.blocks) for kind in kinds] == [2, 3]
    assert kinds[1].weights["proj_mlp.codes"] == ["uint8", [128 * 32 // 2]]
    assert all(len(kind.calls) == 2 for kind in kinds)


def test_sides_of_all_of_a_unet_s_levels_are_dynamic() -> None:
    """Also where a level's halves of both sizes could have been rounded to the same."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 24),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
    )
    sides = (Dim(name="height", min=8, opt=32, max=64), Dim(name="width", min=8, opt=32, max=64))
    batch = Dim(name="batch", min=1, opt=1, max=4)
    sample = TensorSpec(name="sample", dtype="float32", axes=("batch", 4, "height", "width"))
    signature = Signature(
        inputs=(
            sample,
            TensorSpec(name="time_features", dtype="float32", axes=("batch", 8)),
            TensorSpec(name="text", dtype="float32", axes=("batch", 5, 8)),
        ),
        outputs=(sample,),
        dims=(batch, *sides),
    )
    typed = Typed(WRAPPERS["unet"](unet), torch.float32)
    kinds = find_kinds(typed)
    watch_calls(typed, kinds, signature)
    assert len(kinds) == 3
    for kind in kinds:
        first, second = (call[0].shape for call in kind.calls)  # [batch, places, channels]
        assert first[0] != second[0]
        assert first[1] != second[1]


def test_a_component_without_repeated_blocks_is_one_block() -> None:
    (kind,) = find_kinds(Typed(nn.Sequential(nn.Linear(3, 3)), torch.float32))
    assert kind.blocks == [""]


def test_packages_of_two_blocks_give_what_five_blocks_gave(
    source: Path, watched: tuple[Typed, list[Kind]]
) -> None:
    """With each block's own weights, at sizes that were never seen."""
    typed, kinds = watched
    packages = packages_of(typed_of(source), kinds)
    inputs = sized_inputs(SIGNATURE, {"batch": 2, "sequence": 10, "tokens": 5})
    with torch.no_grad():
        wanted = typed(*inputs)[0]
        insert_blocks(typed.wrapper, documents_of(kinds), packages)
        torch.testing.assert_close(typed(*inputs)[0], wanted)
    assert [package.calls for package in packages] == [2, 3]


def packages_of(other: Typed, kinds: list[Kind]) -> list[Any]:
    blocks = [other.wrapper.get_submodule(kind.blocks[0]) for kind in kinds]
    return [Eager(block, kind, other) for block, kind in zip(blocks, kinds, strict=True)]


def documents_of(kinds: list[Kind]) -> list[dict[str, Any]]:
    """As they come from a file."""
    found: list[dict[str, Any]] = json.loads(
        json.dumps([kind.document("package") for kind in kinds])
    )
    return found


def test_each_block_gets_its_own_layers_low_rank_matrices(source: Path) -> None:
    """As the eager engine adds them: weights of floats are changed, in blocks, which are packages,
    and between them; beside low-bit ones the matrices are inputs.
    """
    signature = prepared_forms(source)["lora"]
    typed = typed_of(source, "lora")
    kinds = find_kinds(typed)
    watch_calls(typed, kinds, signature)
    assert [kind.adapted for kind in kinds] == [[], ["proj_mlp"]]
    arrays, wanted = adapted_call(source)
    assert typed.low_rank is not None
    typed.low_rank.hold(arrays, torch.float32)
    packages = packages_of(typed_of(source, "lora"), kinds)
    insert_blocks(typed.wrapper, documents_of(kinds), packages, typed.low_rank)
    with torch.no_grad():
        found = typed(*(torch.from_numpy(arrays[spec.name]) for spec in signature.inputs))
    np.testing.assert_allclose(found[0].numpy(), wanted, atol=1e-4)
    assert [package.calls for package in packages] == [2, 3]


def adapted_call(source: Path) -> tuple[dict[str, Any], Any]:
    """Inputs whose low-rank ones change a lot, one of rank 1 and one of none, and what the eager
    engine gives.
    """
    signature = prepared_forms(source)["lora"]
    sizes = {"batch": 2, "sequence": 10, "tokens": 5, "rank": 3}
    feeds = {
        spec.name: tensor
        for spec, tensor in zip(signature.inputs, sized_inputs(signature, sizes), strict=True)
    }
    lora = {name: 0.1 * x for name, x in feeds.items() if "lora_" in name}
    for name in ("lora_A", "lora_B"):
        key = f"single_transformer_blocks.1.proj_mlp.{name}"
        lora[key] = lora[key][:, :1] if name == "lora_A" else lora[key][:1]
        key = f"single_transformer_blocks.2.proj_mlp.{name}"
        lora[key] = lora[key][:, :0] if name == "lora_A" else lora[key][:0]
    arrays = {name: x.numpy() for name, x in {**feeds, **lora}.items()}
    with eager_engine(source, signature) as engine:
        wanted = engine(arrays)["out"]
        without = {n: np.zeros_like(x) if n in lora else x for n, x in arrays.items()}
        assert np.abs(engine(without)["out"] - wanted).max() > 0.1
    return arrays, wanted


def test_a_form_for_cards_takes_low_rank_inputs(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the card: the program that it would compile, and the feeds that its engine gives."""
    programs, out = [], tmp_path / "out"

    def compiled(program: Any, *_: Any) -> str:
        programs.append(program)
        return ""

    monkeypatch.setattr(aoti_cuda, "on_card", exported)
    monkeypatch.setattr(aoti_cuda, "compile_package", compiled)
    monkeypatch.setattr(aoti_cuda, "code_properties", lambda _packages: {})
    monkeypatch.setattr(aoti_cuda, "card_capability", lambda: "9.0")
    out.mkdir()
    how = How("aoti-cuda", "fp32", "denoiser", "flux_transformer", SIGNATURE)
    built = aoti_cuda.build_form(source, out, how, "lora")
    assert built.files["weights"] == FILES["weights"]
    assert built.files["package"] == "lora.model.pt2"

    def replayed(feeds: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(programs[0].module()(*feeds.values()))

    engine = AotiCudaEngine({}, signature=prepared_forms(source)["lora"], properties={}, threads=1)
    engine._replaying = cast("Any", replayed)
    arrays, wanted = adapted_call(source)
    found = engine._run_tensors({name: torch.from_numpy(x) for name, x in arrays.items()})
    np.testing.assert_allclose(found["out"].numpy(), wanted, atol=1e-4)


def eager_engine(source: Path, signature: Signature) -> EagerEngine:
    names = {
        "config": "config.json",
        "layers": "layers.json",
        "weights": "weights.safetensors",
        "lora": "lora.safetensors",
    }
    return EagerEngine(
        {role: (source / name).read_bytes() for role, name in names.items()},
        signature=signature,
        properties={"wrapper": "flux_transformer", "dtype": "f32"},
        threads=1,
    )


def test_blocks_with_other_adapted_layers_are_refused(source: Path) -> None:
    typed = typed_of(source, "lora")
    kinds = find_kinds(typed)
    watch_calls(typed, kinds, prepared_forms(source)["lora"])
    packages = packages_of(typed_of(source, "lora"), kinds)
    kinds[1].adapted.pop()
    with pytest.raises(BundleError, match="other layers with low-rank inputs"):
        insert_blocks(typed.wrapper, documents_of(kinds), packages, typed.low_rank)


def test_a_weight_of_another_shape_is_refused(watched: tuple[Typed, list[Kind]]) -> None:
    typed, kinds = watched
    kinds[0].weights["norm1.linear.bias"] = ["float32", [7]]
    packages = packages_of(typed, kinds)
    with pytest.raises(BundleError, match=r"norm1\.linear\.bias isn't what its package needs"):
        insert_blocks(typed.wrapper, documents_of(kinds), packages)


def test_a_block_that_is_called_otherwise_is_refused(watched: tuple[Typed, list[Kind]]) -> None:
    typed, kinds = watched
    insert_blocks(typed.wrapper, documents_of(kinds), packages_of(typed, kinds))
    with pytest.raises(BundleError, match="calls its blocks otherwise"):
        typed.wrapper.get_submodule(kinds[0].blocks[0])(torch.zeros(1))
