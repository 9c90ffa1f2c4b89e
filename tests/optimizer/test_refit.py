"""LoRAs in TensorRT engines whose weights can be replaced, as far as no card is needed for it.

Names are held against the network that NVIDIA's own parser makes of the graph, sums against torch
on the graph with replaced weights, calls against a library that stands in for the one with a card.
"""

from __future__ import annotations

import ctypes
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from optimizer.backends import How
from optimizer.backends import tensorrt as builder
from optimizer.export import export_onnx
from optimizer.forms import prepared_forms
from optimizer.lora_form import prepare_lora
from optimizer.quantize.apply import quantized_layer
from optimizer.quantize.schemes import W8A16
from profiles.errors import BuildError, BundleError
from runners.engines.tensorrt import LIBRARIES, TensorRtEngine
from runners.lora_inputs import lora_targets
from runners.quantized import insert_quantized
from runners.refitting import Refitting
from runners.signature import Dim, Signature, TensorSpec

trt = pytest.importorskip("tensorrt_rtx")

PLAIN = Signature(
    inputs=(
        TensorSpec(name="x", dtype="float32", axes=("batch", 8, "height", "width")),
        TensorSpec(name="time", dtype="float32", axes=("batch", 6)),
    ),
    outputs=(TensorSpec(name="y", dtype="float32", axes=("batch", "places", 12)),),
    dims=(
        Dim(name="batch", min=1, opt=2, max=4),
        Dim(name="height", min=4, opt=4, max=8),
        Dim(name="width", min=4, opt=6, max=8),
        Dim(name="places", min=16, opt=24, max=64),
    ),
)
HOW = How("tensorrt", "fp16", "denoiser", "unet", PLAIN)
NAMES = {
    "conv": "module.conv.weight",
    "late": "module.late.weight",
    "wide": "module.wide.weight.transposed",
}
"""Every way in which a layer's weight is stored: of a convolution, and of linears with two and more
axes before them."""


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 10, 3, padding=1)
        self.late = nn.Linear(6, 10)
        self.wide = nn.Linear(10, 12)

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor]:
        seen = self.conv(x) + self.late(time)[:, :, None, None]
        return (self.wide(seen.flatten(2).transpose(1, 2)),)


class _Called(nn.Module):
    """As components are exported."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, time: Tensor) -> Any:
        return self.module(x, time)


def prepared(folder: Path, module: nn.Module) -> Path:
    examples = [torch.randn(2, 8, 4, 6), torch.randn(2, 6)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own code
        export_onnx(_Called(module), examples, PLAIN, folder / "model.onnx")
    prepare_lora(module, PLAIN, folder, with_graph=True)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("floats"), _Layers().eval())


@pytest.fixture
def source(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "source")


@pytest.fixture
def made(source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the files of the form, beside an engine that nobody can build here."""
    monkeypatch.setattr(builder, "import_library", lambda _name: trt)
    monkeypatch.setattr(builder, "card_capability", lambda: "8.9")
    (source / "out").mkdir()
    (source / "out" / "engine.plan").write_bytes(b"plan")
    built = builder.build_form(source, source / "out", HOW, "lora")
    assert built.files == {"engine": "engine.plan", "weights": "weights.safetensors"}
    assert (source / "out" / "engine.plan").read_bytes() == b"plan"
    return source


def loras(source: Path, rank: int, *, but: str = "") -> dict[str, Tensor]:
    """Random ones of all layers; of rank 0 for the layer `but`."""
    found = {}
    for name, target in lora_targets(prepared_forms(source)["lora"]).items():
        own = 0 if name == but else rank
        found[f"{name}.lora_A"] = 0.2 * torch.randn(target.inputs, own, *target.kernel)
        found[f"{name}.lora_B"] = 0.2 * torch.randn(own, target.outputs)
    return found


def test_the_weights_are_those_that_nvidias_parser_knows_by_these_names(source: Path) -> None:
    assert sorted(builder.refitted_weights(source, HOW)) == sorted(NAMES.values())
    graph = source / "narrow.onnx"
    builder._write_narrow(source / "model.onnx", HOW, graph)
    logger = builder._logger(trt, builder._Log())
    strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = trt.Builder(logger).create_network(strong)
    assert trt.OnnxParser(network, logger).parse_from_file(str(graph))
    builder.mark_refitted(network, list(NAMES.values()))
    assert all(network.are_weights_marked_refittable(name) for name in NAMES.values())
    assert not network.are_weights_marked_refittable("module.conv.bias")
    with pytest.raises(BuildError, match=r"no weights called module\.gone\.weight"):
        builder.mark_refitted(network, ["module.gone.weight"])


def test_low_bit_and_streamed_weights_and_those_of_cards_elsewhere_stay(
    source: Path, tmp_path: Path
) -> None:
    module = _Layers().eval()
    insert_quantized(module, {"wide": quantized_layer("wide", module.wide, W8A16(), {})})
    (tmp_path / "low").mkdir()
    assert builder.refitted_weights(prepared(tmp_path / "low", module), HOW) == []
    assert len(builder.refitted_weights(source, HOW)) == 3
    assert builder.refitted_weights(source, replace(HOW, weight_streaming=True)) == []
    assert builder.refitted_weights(source, replace(HOW, backend="tensorrt-rtx")) == []


def replaced(source: Path, weights: Mapping[str, Tensor]) -> onnxruntime.InferenceSession:
    """The graph that the engine is built from, with other weights in it."""
    builder._write_narrow(source / "model.onnx", HOW, source / "narrow.onnx")
    model = onnx.load(source / "narrow.onnx")
    for tensor in model.graph.initializer:
        if (weight := weights.get(tensor.name)) is not None:
            assert list(weight.shape) == list(tensor.dims)
            tensor.CopyFrom(numpy_helper.from_array(weight.numpy(), tensor.name))
    return onnxruntime.InferenceSession(model.SerializeToString())


def test_the_graph_with_the_sums_as_weights_computes_what_low_rank_inputs_do(made: Path) -> None:
    """fp16 rounds the sums once where the other graph rounds three products."""
    raw = (made / "out" / "weights.safetensors").read_bytes()
    refitting = Refitting(raw, prepared_forms(made)["lora"])
    assert refitting.inputs == set(loras(made, 1))
    x, time = torch.randn(2, 8, 4, 6), torch.randn(2, 6)
    given = loras(made, 3)
    changed = refitting.changes(given)
    assert changed.keys() == set(NAMES.values())
    plain = {"x": x.numpy(), "time": time.numpy()}
    (found,) = replaced(made, changed).run(["y"], plain)
    formed = made / builder.prove(made, made, HOW, "lora")["graph"]
    feeds = {**plain, **{name: tensor.numpy() for name, tensor in given.items()}}
    (wanted,) = onnxruntime.InferenceSession(formed).run(["y"], feeds)
    (without,) = replaced(made, {}).run(["y"], plain)
    assert np.abs(found - wanted).max() < 0.01 * np.abs(wanted).max()
    assert np.abs(without - wanted).max() > 0.2 * np.abs(wanted).max()
    back = refitting.changes(loras(made, 0))
    assert back.keys() == set(NAMES.values())
    assert all(torch.equal(back[name], refitting.stored[name]) for name in back)
    assert refitting.changes(loras(made, 0)) == {}


def test_weights_of_another_bundle_are_refused(made: Path) -> None:
    tensors = safetensors.torch.load_file(made / "out" / "weights.safetensors")
    del tensors[NAMES["late"]]
    with pytest.raises(BundleError, match="none of late: compile the bundle again"):
        Refitting(safetensors.torch.save(tensors), prepared_forms(made)["lora"])


class _Card:
    """In the place of the library on a card: keeps the weights that an engine is given.

    Two of its layers' weights are one, as where it multiplies with both at once.
    """

    DataType, TensorLocation, Weights = trt.DataType, trt.TensorLocation, trt.Weights
    fused = (NAMES["late"], NAMES["wide"])

    def __init__(self, stored: Mapping[str, Tensor], *, refuses: str = "") -> None:
        self.weights = {name: tensor.clone() for name, tensor in stored.items()}
        self.refits: list[set[str]] = []
        self.refuses = refuses

    def Refitter(self, _engine: Any, _logger: Any) -> Any:  # noqa: N802 (the library's name)
        given: dict[str, Any] = {}

        def set_named_weights(name: str, weights: Any, where: Any) -> bool:
            given[name] = weights
            return bool(name != self.refuses and where == trt.TensorLocation.HOST)

        def missing() -> list[str]:
            touched = set(self.fused) & given.keys()
            return [name for name in self.fused if touched and name not in given]

        def refit() -> bool:
            if missing():
                return False
            for name, weights in given.items():
                kept = self.weights[name]
                assert weights.dtype == trt.DataType.HALF
                assert weights.size == kept.numel()
                raw = ctypes.string_at(weights.numpy().ctypes.data, weights.nbytes)
                self.weights[name] = torch.frombuffer(bytearray(raw), dtype=kept.dtype).view_as(
                    kept
                )
            self.refits.append(set(given))
            return True

        return SimpleNamespace(
            set_named_weights=set_named_weights,
            get_missing_weights=missing,
            refit_cuda_engine=refit,
        )


@pytest.fixture
def engine(made: Path, monkeypatch: pytest.MonkeyPatch) -> TensorRtEngine:
    """Of the form, open as far as it is without a card."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    form = prepared_forms(made)["lora"]
    properties = {"library": "tensorrt", "version": trt.__version__, "capabilities": "8.9"}
    found = TensorRtEngine({}, signature=form, properties=properties, threads=1)
    found._refitting = Refitting((made / "out" / "weights.safetensors").read_bytes(), form)
    found._trt, found._library = _Card(found._refitting.stored), LIBRARIES["tensorrt"]
    found._engine = found._logger = None
    found._words, found._bound, found._graph = [], ("bound",), "recorded"
    found._opened = True
    return found


def test_held_loras_are_in_the_engines_weights_until_others_are(
    engine: TensorRtEngine, made: Path
) -> None:
    card, refitting = engine._trt, engine._refitting
    assert refitting is not None
    given = loras(made, 4, but="wide")
    engine.hold(given)
    assert card.refits == [set(NAMES.values())]  # what is fused with a changed one is given again
    assert (engine._bound, engine._graph) == ((), None)
    sums = torch.einsum("ir,ro->oi", given["late.lora_A"], given["late.lora_B"])
    sums += refitting.stored[NAMES["late"]]
    torch.testing.assert_close(card.weights[NAMES["late"]], sums.half(), rtol=0, atol=0)
    assert torch.equal(card.weights[NAMES["wide"]], refitting.stored[NAMES["wide"]])

    engine._bound = ("bound",)
    engine.hold(loras(made, 0))
    assert all(torch.equal(card.weights[n], w) for n, w in refitting.stored.items())
    assert len(card.refits) == 2
    engine._bound = ("bound",)
    engine.hold(loras(made, 0))  # nothing changes: nothing is replaced, and the graph stays
    assert len(card.refits) == 2
    assert engine._bound == ("bound",)


def test_what_the_library_refuses_is_said_and_leaves_the_weights(
    engine: TensorRtEngine, made: Path
) -> None:
    engine._trt.refuses = NAMES["conv"]
    engine._words.append("[E] wrong size")
    with pytest.raises(BundleError, match=r"replace module\.conv\.weight in the engine: \[E\] wro"):
        engine.hold(loras(made, 2))
    assert engine._trt.refits == []
    assert engine.held == {}


def test_low_rank_inputs_are_no_inputs_of_the_engine(
    engine: TensorRtEngine, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given with a call, as checks do, or held."""
    seen: list[set[str]] = []

    def bound(_self: Any, feeds: Mapping[str, Tensor]) -> None:
        seen.append(set(feeds))
        raise InterruptedError

    stream = SimpleNamespace(wait_stream=lambda _other: None)
    monkeypatch.setattr(TensorRtEngine, "_bind", bound)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: warnings.catch_warnings())
    engine._stream = stream
    plain = {"x": torch.randn(2, 8, 4, 6), "time": torch.randn(2, 6)}
    with pytest.raises(InterruptedError):
        engine.on_device({**plain, **loras(made, 1)})
    engine.hold(loras(made, 2))
    with pytest.raises(InterruptedError):
        engine.on_device(plain)
    assert seen == [{"x", "time"}, {"x", "time"}]
    assert len(engine._trt.refits) == 2
