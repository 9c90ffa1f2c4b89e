"""ONNX Runtime on cards, as far as a processor can show it: graph, session, binding, refusals."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from optimizer.backends import How
from optimizer.backends.onnxruntime_cuda import build, build_form
from optimizer.export import export_onnx
from optimizer.forms import save_form
from optimizer.lora_graph import add_low_rank
from optimizer.onnx_files import read_graph
from profiles.errors import DeviceMismatch, MissingError
from profiles.libraries import version_of
from runners.engines.onnxruntime import open_session
from runners.engines.onnxruntime_cuda import PROVIDER, Bound, OnnxRuntimeCudaEngine
from runners.lora_inputs import Target, with_lora
from runners.signature import Dim, Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", axes=("batch", "tokens", 32)),),
    outputs=(TensorSpec(name="y", dtype="float32", axes=("batch", "tokens", 16)),),
    dims=(Dim(name="batch", min=1, opt=2, max=4), Dim(name="tokens", min=2, opt=8, max=16)),
)


class _Tuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.nn.functional.silu(self.layer(x)),)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, dict[str, bytes], Any]:
    """A module, and its engine's files and properties in fp16."""
    folder, module = tmp_path_factory.mktemp("ort"), _Tuple().eval()
    (folder / "out").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own code
        export_onnx(module, [torch.randn(3, 5, 32)], SIGNATURE, folder / "model.onnx")
    how = How("onnxruntime-cuda", "fp16", "denoiser", "unet", SIGNATURE)
    made = build(folder, folder / "out", how, lambda _done, _total: None)
    files = {role: (folder / "out" / name).read_bytes() for role, name in made.files.items()}
    return module, files, made.properties


def test_bound_tensors_are_read_and_written_where_they_lie(
    built: tuple[nn.Module, dict[str, bytes], Any],
) -> None:
    """In fp16 between fp32 ends: 11 significant bits an operation."""
    module, files, properties = built
    session = open_session(files, properties, threads=1)
    for shape in ((2, 8, 32), (1, 3, 32)):
        bound = None
        for seed in (0, 1):
            torch.manual_seed(seed)
            x = torch.randn(shape)
            bound = bound or Bound(session, SIGNATURE, {"x": x}, "cpu")
            found = bound.run({"x": x})["y"]
            with torch.no_grad():
                torch.testing.assert_close(found, module(x)[0], rtol=1e-2, atol=5e-3)
            assert found.data_ptr() != bound.outputs["y"].data_ptr()


def test_a_form_takes_low_rank_inputs_over_the_same_weights(tmp_path: Path) -> None:
    module, out = _Tuple().eval(), tmp_path / "out"
    out.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own code
        export_onnx(module, [torch.randn(3, 5, 32)], SIGNATURE, tmp_path / "model.onnx")
    how = How("onnxruntime-cuda", "fp16", "denoiser", "unet", SIGNATURE)
    build(tmp_path, out, how, lambda _done, _total: None)
    weights = (out / "model.onnx.data").read_bytes()
    model = read_graph(tmp_path / "model.onnx")
    signature = with_lora(SIGNATURE, add_low_rank(model, {"layer": Target(32, 16)}, {}))
    save_form("lora", signature, tmp_path, model)
    made = build_form(tmp_path, out, how, "lora")
    files = {role: (out / name).read_bytes() for role, name in made.files.items()}
    assert files["weights"] == weights
    x, down, up = torch.randn(2, 8, 32), 0.1 * torch.randn(32, 3), 0.1 * torch.randn(3, 16)
    feeds = {"x": x, "layer.lora_A": down, "layer.lora_B": up}
    session = open_session(files, made.properties, threads=1)
    found = Bound(session, signature, feeds, "cpu").run(feeds)["y"]
    with torch.no_grad():
        wanted = torch.nn.functional.silu(module.layer(x) + x @ down @ up)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=5e-3)


def test_its_weights_are_in_16_bits(built: tuple[nn.Module, dict[str, bytes], Any]) -> None:
    assert len(built[1]["weights"]) + len(built[1]["graph"]) < 32 * 16 * 4 + 2000
    assert isinstance(ir.serde.deserialize_model(_proto(built[1]["graph"])), ir.Model)


def _proto(raw: bytes) -> Any:
    import onnx

    return onnx.load_from_string(raw)


def test_without_a_build_for_cards_the_command_is_named() -> None:
    import onnxruntime as ort

    if PROVIDER in ort.get_available_providers():
        pytest.skip("this build has CUDA")
    assert not OnnxRuntimeCudaEngine.usable_here({})
    with pytest.raises(MissingError, match="pip install onnxruntime-gpu"):
        OnnxRuntimeCudaEngine.require_here({})


def test_without_a_card_the_processors_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    monkeypatch.setattr(
        "runners.engines.onnxruntime_cuda.ort.get_available_providers", lambda: [PROVIDER]
    )
    with pytest.raises(DeviceMismatch, match="--backend onnxruntime"):
        OnnxRuntimeCudaEngine.require_here({})


def test_the_processors_build_does_not_count_as_the_cards() -> None:
    assert version_of("onnxruntime-gpu", {"onnxruntime": "1.30"}) is None
    assert version_of("onnxruntime-gpu", {"onnxruntime-gpu": "1.30"}) == "1.30"


@pytest.mark.parametrize(
    ("backend", "code", "words"),
    [
        ("onnxruntime-cuda", 17, "needs onnxruntime-gpu, which isn't installed: run pip install "),
        ("aoti-cuda", 10, "no NVIDIA card is usable here: use --backend tensorrt-rtx"),
    ],
)
def test_compiling_for_a_card_that_is_not_here_is_refused_before_any_work(
    kiln: Callable[..., Any], tiny_model: Path, tmp_path: Path, backend: str, code: int, words: str
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    options = ("--backend", backend, "--quant", "none", "-o", tmp_path / "out")
    ended = kiln("compile", tiny_model, *options)
    assert (ended.code, words in ended.sentence) == (code, True), ended.sentence
