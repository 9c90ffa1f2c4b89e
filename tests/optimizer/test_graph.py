"""What the exporter's graph is cleaned to, on a block that has every kind of layer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimizer.backends import How
from optimizer.export import export_onnx
from optimizer.graph import fold_fp4
from optimizer.numerics import sqnr_db
from optimizer.quantize.apply import planned_layers, quantizable_layers, quantized_layers
from optimizer.quantize.observe import observing
from optimizer.quantize.policy import LEVELS, Policy, Rule
from optimizer.quantize.schemes import W4A16, W8A8, Scheme
from profiles.errors import BuildError
from runners.engines.onnxruntime import ACCURACY
from runners.quantized import FP4_VALUES, insert_quantized
from runners.signature import Dim, Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", axes=("batch", 64, "height", "width")),),
    outputs=(TensorSpec(name="y", dtype="float32", axes=("batch", "tokens", 64)),),
    dims=(
        Dim(name="batch", min=1, opt=2, max=4),
        Dim(name="height", min=2, opt=4, max=8),
        Dim(name="width", min=2, opt=4, max=8),
    ),
)


class Block(nn.Module):
    """A convolution, and attention whose q, k and v read the same tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(64, 64, 3, padding=1)
        self.q, self.k, self.v = (nn.Linear(64, 64, bias=False) for _ in range(3))
        self.out = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        tokens = F.silu(self.convolution(x)).flatten(2).transpose(1, 2)
        heads = (
            layer(tokens).unflatten(2, (4, 16)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        found = F.scaled_dot_product_attention(*heads)
        return (self.out(found.transpose(1, 2).flatten(2)),)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


HOW = How("onnxruntime", "fp32", "denoiser", "unet", SIGNATURE)


FOR_TORCH = ("nf4", "w8a16-dynamic", "llm-int8", "torchao-int8-dyn")
SCHEMES: dict[str, Scheme] = {
    **{n: s for n, s in LEVELS.items() if s.format not in FOR_TORCH},
    "int4z": W4A16(symmetric=False),
    "int4r": W4A16(rank=8),
    "int8o": W8A8(output=True),
}
"""All that ONNX can say: nf4, and rounding inputs as they come, are for torch."""


def block(quant: str) -> Block:
    torch.manual_seed(0)
    root = Block().eval()
    policy = Policy(rules=(Rule(pattern="*", scheme=SCHEMES[quant]),))
    with torch.no_grad(), observing(root, quantizable_layers(root), ["*"]) as statistics:
        root(values(2, 64, 4, 4))
    schemes = planned_layers(root, policy)
    insert_quantized(root, quantized_layers(root, schemes, statistics, "mse"))
    return root


def export(root: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export warns of its own deprecated tree types
        export_onnx(root, (values(3, 64, 5, 7),), SIGNATURE, path)


@pytest.fixture(scope="module", params=list(SCHEMES))
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Block, Path]:
    quant = request.param
    root = block(quant)
    path = tmp_path_factory.mktemp(quant) / "model.onnx"
    export(root, path)
    return quant, root, path


Exported = tuple[str, Block, Path]


def test_the_graph_carries_nothing_of_the_exporter(exported: Exported) -> None:
    _, _, path = exported
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    assert not model.metadata_props
    assert not model.doc_string
    assert not graph.value_info
    assert not graph.metadata_props
    assert not graph.doc_string
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        assert not item.doc_string
        assert not item.metadata_props
    assert not model.functions
    raw = path.read_bytes()
    for word in (b"site-packages", b".py", b"pkg.torch", str(path.parent).encode()):
        assert word not in raw


def test_parameters_keep_their_names(exported: Exported) -> None:
    _, root, path = exported
    names = {item.name for item in onnx.load(path, load_external_data=False).graph.initializer}
    large = {name for name, tensor in root.state_dict().items() if tensor.numel() > 1}
    assert large <= {name.removesuffix(".transposed") for name in names}


def test_the_graph_runs_in_onnx_runtime_at_sizes_it_was_not_traced_with(
    exported: Exported,
) -> None:
    """At least 60 dB with rounded inputs: a value on the edge of a step may fall on either side of
    it (one step of 1/127 in a thousand values is 60 dB); 45 dB where outputs are rounded too and
    one of three dozen falls so; without rounding, 100 dB of float sums.
    """
    quant, root, path = exported
    if quant == "nvfp4":  # for which ONNX Runtime has no kernels on processors
        model = ir.load(path)
        fold_fp4(model)
        path = path.with_name("folded.onnx")
        ir.save(model, path)
    options = ort.SessionOptions()
    options.add_session_config_entry(ACCURACY, "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    limit = 45 if quant == "int8o" else 60 if SCHEMES[quant].calibrates else 100
    for size in ((1, 64, 2, 8), (4, 64, 6, 3)):
        x = values(*size, seed=1)
        with torch.no_grad():
            (wanted,) = root(x)
        (found,) = session.run(None, {"x": x.numpy()})
        assert found.shape == tuple(wanted.shape)
        assert sqnr_db([(wanted.numpy(), found)]) >= limit


def nodes(path: Path, kind: str) -> list[Any]:
    graph = onnx.load(path, load_external_data=False).graph
    return [node for node in graph.node if node.op_type == kind]


def test_weights_are_stored_in_the_levels_own_type(exported: Exported) -> None:
    quant, root, path = exported
    initializers = {
        item.name: item for item in onnx.load(path, load_external_data=True).graph.initializer
    }
    codes = {name: item for name, item in initializers.items() if name.endswith(".codes")}
    if quant == "none":
        assert not codes
        assert not nodes(path, "DequantizeLinear")
        return
    assert len(codes) == 5
    kind, bits = {
        "int8": (onnx.TensorProto.INT8, 8),
        "int4": (onnx.TensorProto.INT4, 4),
        "int4z": (onnx.TensorProto.UINT4, 4),
        "fp8": (onnx.TensorProto.FLOAT8E4M3FN, 8),
        "nvfp4": (onnx.TensorProto.FLOAT4E2M1, 4),
    }[{"int8w": "int8", "int8o": "int8", "int4-dyn": "int4", "int4r": "int4"}.get(quant, quant)]
    for name, item in codes.items():
        assert item.data_type == kind
        found = onnx.numpy_helper.to_array(item).astype(np.float32)
        wanted = root.get_buffer(name)
        if quant == "nvfp4":
            wanted = torch.tensor(FP4_VALUES)[wanted.long()]
        np.testing.assert_array_equal(found, wanted.float().numpy())
        assert len(item.raw_data) == found.size * bits // 8
        if quant == "int4z":
            zero = initializers[name.replace(".codes", ".zero")]
            assert zero.data_type == kind
    assert len(nodes(path, "DequantizeLinear")) >= 5


def test_equal_inputs_are_rounded_once(exported: Exported) -> None:
    """q, k and v share one QuantizeLinear, so that an engine computes it once and may fuse them."""
    quant, _, path = exported
    rounded = nodes(path, "QuantizeLinear")
    inputs, outputs = 3, 5  # of the block: five layers, of which three read the same tokens
    expected = {"int8": inputs, "fp8": inputs, "int8o": inputs + outputs}.get(quant, 0)
    assert len(rounded) == expected
    assert len({node.input[0] for node in rounded}) == len(rounded)
    if rounded:
        readers = [node.input[0] for node in nodes(path, "DequantizeLinear")]
        assert all(readers.count(node.output[0]) == 1 for node in rounded)


class Normed(Block):
    """Norms before the convolution's proj and before q, k and v give outlier channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.groups = nn.GroupNorm(4, 64)
        self.proj = nn.Conv2d(64, 64, 1)
        with torch.no_grad():
            self.norm.weight[::8] = 50.0
            self.groups.weight[::8] = 50.0
            self.convolution.weight[:, ::8] /= 50
            self.proj.weight[:, ::8] /= 50

    def forward(self, x: Tensor) -> tuple[Tensor]:
        projected = self.proj(self.groups(self.convolution(x)))
        tokens = self.norm(F.silu(projected).flatten(2).transpose(1, 2))
        heads = (
            layer(tokens).unflatten(2, (4, 16)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        return (self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)),)


def outliers(*shape: int, seed: int = 0) -> Tensor:
    x = values(*shape, seed=seed)
    x[:, ::8] *= 50
    return x


def test_multipliers_are_folded_into_the_norm_before_or_done_once(tmp_path: Path) -> None:
    """q, k, v and proj: the norm's own scale and bias; the convolution: one Mul."""
    torch.manual_seed(0)
    root = Normed().eval()
    layers = quantizable_layers(root)
    with torch.no_grad(), observing(root, layers) as statistics:
        root(outliers(2, 64, 4, 4))
    schemes = planned_layers(root, Policy(rules=(Rule(pattern="[!o]*", scheme=W8A8()),)))
    insert_quantized(root, quantized_layers(root, schemes, statistics, "smoothquant"))
    assert root.q.multiplier is not None
    assert root.convolution.multiplier is not None
    path = tmp_path / "model.onnx"
    export(root, path)
    graph = onnx.load(path).graph
    products = [
        [name for name in node.input if "multiplier" in name] for node in nodes(path, "Mul")
    ]
    assert [len(names) for names in products if names] == [1]
    scales = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    for kind, norm, reader in (
        ("LayerNormalization", root.norm, root.q),
        ("GroupNormalization", root.groups, root.proj),
    ):
        (node,) = nodes(path, kind)
        wanted = norm.weight.detach() * reader.multiplier.flatten()  # type: ignore[operator,union-attr]
        np.testing.assert_allclose(scales[node.input[1]], wanted.numpy())
    assert len(nodes(path, "QuantizeLinear")) == 3
    x = outliers(1, 64, 6, 3, seed=1)
    with torch.no_grad():
        (wanted,) = root(x)
    (found,) = ort.InferenceSession(path).run(None, {"x": x.numpy()})
    assert sqnr_db([(wanted.numpy(), found)]) >= 60


def test_the_same_module_gives_the_same_files(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "model.onnx"
        export(block("int8"), path)
        found.append((path.read_bytes(), path.with_name("model.onnx.data").read_bytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("quant", "kernel", "count"),
    [
        ("int4", "MatMulNBits", 4),
        ("int4z", "MatMulNBits", 4),
        ("int4r", "MatMulNBits", 4),
        ("int8", "MatMulIntegerToFloat", 5),
        ("int8o", "MatMulIntegerToFloat", 5),
    ],
)
def test_onnx_runtime_gets_a_low_bit_kernel_for_every_product_that_has_one(
    tmp_path: Path, quant: str, kernel: str, count: int
) -> None:
    """The same numbers from the same codes; convolutions have one for 8 bits only."""
    from optimizer.backends.onnxruntime import build

    root = block(quant)
    path = tmp_path / "model.onnx"
    export(root, path)
    (tmp_path / "built").mkdir()
    build(tmp_path, tmp_path / "built", HOW, lambda _done, _total: None)
    found = tmp_path / "built" / "model.onnx"
    kernels = nodes(found, kernel)
    assert len(kernels) == count
    weights = [node for node in nodes(found, "DequantizeLinear") if "codes" in node.input[0]]
    assert len(weights) == 5 - count
    options = ort.SessionOptions()
    options.add_session_config_entry(ACCURACY, "1")
    x = values(2, 64, 6, 3, seed=1)
    with torch.no_grad():
        (wanted,) = root(x)
    (given,) = ort.InferenceSession(found, options).run(None, {"x": x.numpy()})
    limit = {"int8": 60, "int8o": 45}.get(quant, 100)  # values on the edges of steps: see above
    assert sqnr_db([(wanted.numpy(), given)]) >= limit
    sizes = [
        sum(item.stat().st_size for item in (p, p.with_name("model.onnx.data")))
        for p in (path, found)
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


@pytest.mark.parametrize(
    "how",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (3, 2), "padding": (0, 1), "dilation": (2, 1), "bias": False},
    ],
)
def test_a_convolution_of_any_kind_is_the_same_product_of_patches(
    tmp_path: Path, how: dict[str, Any]
) -> None:
    """Whole numbers, so that nothing is lost: equal to the last bit, but for the sums of floats."""
    from optimizer.backends.onnxruntime import build

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Conv2d(64, 64, **how) for _ in range(2))

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return ((self.one(x) + self.two(x)).flatten(2).transpose(1, 2),)

    torch.manual_seed(0)
    root = Both().eval()
    with torch.no_grad(), observing(root, ["one", "two"]) as statistics:
        root(values(2, 64, 8, 8))
    schemes: dict[str, Scheme] = {"one": W8A8(), "two": W8A8()}
    insert_quantized(root, quantized_layers(root, schemes, statistics, "mse"))
    for name in schemes:
        root.get_submodule(name).activation_scale.fill_(0.25)  # type: ignore[union-attr,operator]
    path = tmp_path / "model.onnx"
    export(root, path)
    (tmp_path / "built").mkdir()
    build(tmp_path, tmp_path / "built", HOW, lambda _done, _total: None)
    found = tmp_path / "built" / "model.onnx"
    assert len(nodes(found, "MatMulIntegerToFloat")) == 2
    assert len(nodes(found, "QuantizeLinear")) == 1
    assert not nodes(found, "Conv")
    x = torch.round(values(3, 64, 7, 8, seed=1) * 8) / 8
    with torch.no_grad():
        (wanted,) = root(x)
    (given,) = ort.InferenceSession(found).run(None, {"x": x.numpy()})
    assert given.shape == tuple(wanted.shape)
    assert sqnr_db([(wanted.numpy(), given)]) >= 100


def test_what_cannot_be_exported_is_a_build_error_with_its_reason(tmp_path: Path) -> None:
    class Flat(Block):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            tokens = x.flatten(2).transpose(1, 2)
            return (F.scaled_dot_product_attention(tokens, tokens, tokens),)

    with pytest.raises(BuildError) as caught:
        export(Flat(), tmp_path / "model.onnx")
    assert "only 4D query, key, and value are supported" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
