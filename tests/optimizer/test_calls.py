from __future__ import annotations

from pathlib import Path

import numpy as np

from optimizer.calls import (
    Call,
    load_calls,
    resized,
    save_calls,
    traced_sizes,
    unseen_sizes,
)
from optimizer.families import family
from optimizer.families.base import Ranges
from runners.signature import Dim, Signature, TensorSpec

CONFIGS = {
    "text_encoder": {"max_position_embeddings": 32, "hidden_size": 8, "num_hidden_layers": 2},
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 8,
        "sample_size": 16,
        "block_out_channels": [8],
    },
    "vae": {
        "latent_channels": 4,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [1, 1, 1],
    },
}
SIGNATURES = family("sd1").signatures(CONFIGS, Ranges(32, 64, 128, 2))


def test_calls_round_trip_in_the_order_of_their_names(tmp_path: Path) -> None:
    calls = {
        name: Call(
            (np.full((2, 3), i, np.float32), np.arange(i + 1)), (np.zeros((1, i + 1), np.float32),)
        )
        for i, name in enumerate(["0001", "0000", "0010"])
    }
    save_calls(calls, tmp_path / "calls.safetensors")
    again = load_calls(tmp_path / "calls.safetensors")
    assert list(again) == ["0000", "0001", "0010"]
    for name, call in calls.items():
        for wanted, found in zip(call.inputs, again[name].inputs, strict=True):
            np.testing.assert_array_equal(found, wanted)
            assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(again[name].outputs[0], call.outputs[0])


def test_more_than_ten_tensors_keep_their_order(tmp_path: Path) -> None:
    call = Call(tuple(np.array([i]) for i in range(12)), ())
    save_calls({"0": call}, tmp_path / "calls.safetensors")
    found = load_calls(tmp_path / "calls.safetensors")["0"]
    assert [int(array[0]) for array in found.inputs] == list(range(12))


def test_inputs_are_tiled_and_cut_to_other_sizes() -> None:
    signature = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", axes=("batch", 2, "width")),),
        outputs=(),
        dims=(Dim(name="batch", min=1, opt=1, max=9), Dim(name="width", min=1, opt=1, max=9)),
    )
    x = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    (wider,) = resized([x], signature, {"batch": 2, "width": 5})
    assert wider[0].tolist() == wider[1].tolist() == [[0, 1, 2, 0, 1], [3, 4, 5, 3, 4]]
    (narrower,) = resized([x], signature, {"batch": 1, "width": 2})
    assert narrower.tolist() == [[[0, 1], [3, 4]]]


def test_unseen_sizes_are_two_legal_ones_and_not_the_native_one() -> None:
    for signature in SIGNATURES.values():
        found = unseen_sizes(signature)
        for sizes in found.values():
            assert all(dim.legal(sizes[dim.name]) for dim in signature.dims)
            sides = {name: size for name, size in sizes.items() if name != "batch"}
            assert not sides or sides != {dim.name: dim.opt for dim in signature.dims}
        assert len(found) == 2


def test_a_bundle_for_one_size_is_checked_at_that_size() -> None:
    for signature in family("sd1").signatures(CONFIGS, Ranges(64, 64, 64, 1)).values():
        for sizes in unseen_sizes(signature).values():
            assert all(dim.legal(sizes[dim.name]) for dim in signature.dims)


def test_traced_sides_are_no_multiples_of_the_models_downsampling() -> None:
    sizes = traced_sizes(SIGNATURES["unet"])
    assert all(sizes[name] // 2 % 2 for name in ("height", "width"))
    assert sizes["height"] != sizes["width"]
