"""AOTInductor packages: what is refused unread, what runs, and where."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimizer.backends.aoti import (
    FILES,
    INT8_KERNELS,
    SETTINGS,
    Typed,
    code_properties,
    compile_package,
    exported,
    needed_glibc,
    write_constants,
)
from profiles.errors import BundleError, DeviceMismatch, SpecError
from profiles.hardware import read_cpu
from runners.engines.aoti import AotiEngine
from runners.engines.aoti_package import Package, require_platform, scan_package
from runners.engines.base import Engine
from runners.engines.eager import eager_state
from runners.lora_inputs import Target, lora_targets, with_lora
from runners.low_rank import LowRank
from runners.lowered import lower_layers, processor_product
from runners.quantized import Quantization, QuantizedLayer
from runners.signature import Dim, Signature, TensorSpec
from runners.stored_tensors import read_tensors

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", axes=("batch", "tokens", 64)),),
    outputs=(TensorSpec(name="y", dtype="float32", axes=("batch", "tokens", 32)),),
    dims=(Dim(name="batch", min=1, opt=2, max=4), Dim(name="tokens", min=2, opt=40, max=64)),
)


class Made(NamedTuple):
    """A package in its folder, and the module that it was compiled from."""

    folder: Path
    module: nn.Module
    properties: dict[str, Any]
    code: str

    def engine(
        self, folder: Path | None = None, signature: Signature = SIGNATURE, **changed: Any
    ) -> Engine:
        names = dict(FILES) if not self.properties["frozen"] else {"package": FILES["package"]}
        where = folder or self.folder
        return AotiEngine(
            {role: bytearray((where / name).read_bytes()) for role, name in names.items()},
            signature=signature,
            properties={**self.properties, **changed},
            threads=1,
        )


class _Tuple(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (self.inner(*inputs),)


def quantized(form: str, out: int, inside: int) -> QuantizedLayer:
    """A linear of random codes: int8 with rounded inputs, or int4 in groups of 32."""
    scale = torch.rand(out) * 0.01 + 0.01
    bias = torch.randn(out)
    if form == "int8":
        codes = torch.randint(-127, 128, (out, inside), dtype=torch.int8)
        step = torch.tensor(0.03)
        tensors = {"codes": codes, "scale": scale, "activation_scale": step, "bias": bias}
        return QuantizedLayer(Quantization("int8"), tensors, None)
    codes = torch.randint(-7, 8, (out, inside), dtype=torch.int8)
    scales = (torch.rand(out, inside // 32) * 0.05 + 0.01).half().float()
    return QuantizedLayer(
        Quantization("int4", 32), {"codes": codes, "scale": scales, "bias": bias}, None
    )


def made(
    folder: Path,
    module: nn.Module,
    *,
    frozen: bool,
    signature: Signature = SIGNATURE,
) -> Made:
    whole = _Tuple(module).eval().requires_grad_(False)
    called: nn.Module = whole
    if lora_targets(signature):
        called = typed = Typed(whole, torch.float32)
        typed.low_rank = LowRank(module, signature, None)
        typed.names = [spec.name for spec in signature.inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own code
        program = exported(called, signature)
        more = {"freezing": frozen, "aot_inductor.package_constants_in_so": frozen}
        settings = {**SETTINGS, **more}
        code = compile_package(program, folder / FILES["package"], settings)
    if not frozen:
        safetensors.torch.save_file(eager_state(module)[1], folder / "eager.safetensors")
        write_constants(program, folder / "eager.safetensors", folder)
    found = {**code_properties([folder / FILES["package"]]), "frozen": frozen, "low_bit_kernels": 0}
    return Made(folder, whole, found, code)


@pytest.fixture(scope="module")
def weightless(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two linears, their weights beside the package."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 32))
    return made(tmp_path_factory.mktemp("weightless"), module, frozen=False)


@pytest.fixture(scope="module")
def low_bit(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An int8 and a 4-bit linear, their weights inside the package."""
    torch.manual_seed(0)
    module = nn.Sequential(quantized("int8", 64, 64), nn.SiLU(), quantized("int4", 32, 64))
    lower_layers(module, processor_product)
    return made(tmp_path_factory.mktemp("frozen"), module, frozen=True)


def test_low_rank_inputs_of_any_rank_beside_low_bit_weights(tmp_path: Path) -> None:
    """Each layer's rank is its own, 0 and 1 included, which torch's ranges leave out."""
    torch.manual_seed(0)
    module = nn.Sequential(quantized("int8", 64, 64), nn.SiLU(), quantized("int4", 32, 64))
    lowered = lower_layers(module, processor_product)
    form = with_lora(SIGNATURE, {"0": Target(64, 64), "2": Target(64, 32)})
    found = made(tmp_path, module, frozen=True, signature=form)
    assert len(INT8_KERNELS.findall(found.code)) == 1
    rng = np.random.default_rng(0)
    with found.engine(signature=form) as engine:
        for ranks in ((0, 0), (1, 5), (3, 2)):
            feeds = {"x": rng.standard_normal((2, 33, 64), np.float32)}
            for layer, rank, out in (("0", ranks[0], 64), ("2", ranks[1], 32)):
                feeds[f"{layer}.lora_A"] = 0.2 * rng.standard_normal((64, rank), np.float32)
                feeds[f"{layer}.lora_B"] = 0.2 * rng.standard_normal((rank, out), np.float32)
            wanted = torch.from_numpy(feeds["x"])
            for layer in ("0", "2"):
                down, up = (torch.from_numpy(feeds[f"{layer}.lora_{end}"]) for end in "AB")
                wanted = lowered[layer]._product(lowered[layer], wanted) + (wanted @ down) @ up
                wanted = nn.functional.silu(wanted) if layer == "0" else wanted
            np.testing.assert_allclose(engine(feeds)["y"], wanted.detach().numpy(), atol=0.05)


def test_low_rank_inputs_of_any_rank_beside_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 4, 3, stride=2, padding=1)
    )
    dims = (Dim(name="height", min=8, opt=16, max=64), Dim(name="width", min=8, opt=16, max=64))
    plain = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", axes=(2, 8, "height", "width")),),
        outputs=(TensorSpec(name="y", dtype="float32", axes=(2, 4, "height", "width")),),
        dims=dims,
    )
    form = with_lora(plain, {"0": Target(8, 16, (3, 3)), "2": Target(16, 4, (3, 3))})
    found = made(tmp_path, module, frozen=True, signature=form)
    with found.engine(signature=form) as engine:
        for ranks in ((0, 0), (1, 4), (3, 0)):
            x = torch.randn(2, 8, 10, 23)
            feeds, wanted = {"x": x.numpy()}, x
            for layer, rank, inside, out in (("0", ranks[0], 8, 16), ("2", ranks[1], 16, 4)):
                one = module[int(layer)]
                down, up = 0.2 * torch.randn(inside, rank, 3, 3), 0.2 * torch.randn(rank, out)
                feeds |= {f"{layer}.lora_A": down.numpy(), f"{layer}.lora_B": up.numpy()}
                changed = one.weight + torch.einsum("irhw,ro->oihw", down, up)
                wanted = F.conv2d(wanted, changed, one.bias, one.stride, one.padding)
                wanted = F.silu(wanted) if layer == "0" else wanted
            np.testing.assert_allclose(engine(feeds)["y"], wanted.numpy(), atol=1e-4)


def test_held_low_rank_inputs_are_added_to_weights_of_floats(tmp_path: Path) -> None:
    """In the plain package, which gives what it gave, to the last bit, when they are of rank 0."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 32))
    found = made(tmp_path, module, frozen=False)
    safetensors.torch.save_file({"2.output": torch.full((32,), 2.0)}, tmp_path / "lora")
    form = with_lora(SIGNATURE, {"0": Target(64, 48), "2": Target(48, 32)})
    names = {**FILES, "lora": "lora"}
    files = {role: bytearray((tmp_path / name).read_bytes()) for role, name in names.items()}
    x, rng = np.random.default_rng(0).standard_normal((2, 33, 64), np.float32), np.random
    with (
        found.engine() as plain,
        AotiEngine(files, signature=form, properties=found.properties, threads=1) as engine,
    ):
        for ranks in ((3, 0), (1, 5), (0, 0)):
            lora = {}
            for layer, rank, inside, out in (("0", ranks[0], 64, 48), ("2", ranks[1], 48, 32)):
                lora[f"{layer}.lora_A"] = 0.2 * rng.rand(inside, rank).astype(np.float32)
                lora[f"{layer}.lora_B"] = 0.2 * rng.rand(rank, out).astype(np.float32)
            adapted = [module[0].weight + torch.from_numpy((lora["0.lora_A"] @ lora["0.lora_B"]).T)]
            # the layer's output was multiplied by 2 when it was quantized
            adapted += [
                module[2].weight + 2 * torch.from_numpy(lora["2.lora_A"] @ lora["2.lora_B"]).T
            ]
            inner = nn.functional.linear(torch.from_numpy(x), adapted[0], module[0].bias)
            wanted = nn.functional.linear(nn.functional.silu(inner), adapted[1], module[2].bias)
            engine.hold(lora)
            got = engine({"x": x})["y"]
            np.testing.assert_allclose(got, wanted.detach().numpy(), rtol=1e-4, atol=1e-4)
        assert np.array_equal(got, plain({"x": x})["y"])
        with pytest.raises(SpecError, match="takes the inputs"):
            engine({"x": x, **lora})
        with pytest.raises(SpecError, match=r"0\.lora_A needs 64"):
            engine.hold({**lora, "0.lora_A": lora["2.lora_A"]})


def test_a_weight_of_two_names_is_stored_once(tmp_path: Path) -> None:
    """As T5's embeddings are."""
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval().requires_grad_(False)
    module[1].weight = module[0].weight
    state = eager_state(module)[1]
    assert set(state) == {"0.weight", "0.bias", "1.bias"}
    safetensors.torch.save_file(state, tmp_path / "eager.safetensors")
    write_constants(exported(_Tuple(module), SIGNATURE), tmp_path / "eager.safetensors", tmp_path)
    table = json.loads((tmp_path / FILES["table"]).read_text())
    ends = {name.removeprefix("inner."): entry[:2] for name, entry in table.items()}
    assert ends == {
        "0.weight": ["weights", "0.weight"],
        "0.bias": ["weights", "0.bias"],
        "1.weight": ["weights", "0.weight"],
        "1.bias": ["weights", "1.bias"],
    }
    assert not safetensors.torch.load_file(tmp_path / FILES["constants"])


@pytest.fixture
def package(weightless: Made) -> bytes:
    return (weightless.folder / FILES["package"]).read_bytes()


def run_at(engine: Engine, module: nn.Module, shape: tuple[int, ...]) -> float:
    """The largest difference to the module, of outputs about 1."""
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    with torch.no_grad():
        wanted = module(torch.from_numpy(x))[0].numpy()
    return float(np.abs(engine({"x": x})["y"] - wanted).max())


def test_it_runs_at_all_sizes_of_the_range(weightless: Made) -> None:
    with weightless.engine() as engine:
        for shape in ((1, 2, 64), (3, 37, 64), (4, 64, 64), (1, 40, 64)):
            assert run_at(engine, weightless.module, shape) < 1e-5


def test_a_size_outside_the_range_names_the_nearest(weightless: Made) -> None:
    with weightless.engine() as engine, pytest.raises(SpecError, match="2 to 64: use 64"):
        engine({"x": np.zeros((1, 65, 64), np.float32)})


def test_a_moved_package_runs_where_our_operators_were_never_imported(
    low_bit: Made, tmp_path: Path
) -> None:
    """With torch alone, and no compiler on the path."""
    moved = tmp_path / "elsewhere.pt2"
    moved.write_bytes((low_bit.folder / FILES["package"]).read_bytes())
    x = torch.linspace(-2, 2, 2 * 5 * 64).view(2, 5, 64)
    with torch.no_grad():
        wanted = low_bit.module(x)[0].flatten().tolist()
    script = (
        "import json, sys, torch\n"
        f"model = torch._inductor.aoti_load_package({str(moved)!r})\n"
        "x = torch.linspace(-2, 2, 2 * 5 * 64).view(2, 5, 64)\n"
        "found = model(x)[0].flatten().tolist()\n"
        "kiln = [n for n in sys.modules if n.startswith(('runners', 'optimizer'))]\n"
        "print(json.dumps([found, kiln, hasattr(torch.ops.kiln, 'quantize_dequantize')]))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    found, ours, has_operator = json.loads(ran.stdout.strip().splitlines()[-1])
    np.testing.assert_allclose(found, wanted, atol=2e-3)
    assert ours == []
    assert not has_operator


def test_int8_runs_on_an_int8_kernel_and_4_bits_stay_4_bits(low_bit: Made) -> None:
    """Else 64 x 64 floats would be in the code's constants; their bytes are those of the codes."""
    assert len(INT8_KERNELS.findall(low_bit.code)) == 1
    with low_bit.engine() as engine:
        assert run_at(engine, low_bit.module, (2, 33, 64)) < 0.05  # a flip is a step: 0.03 x 0.02
        codes = [n for n in engine._package._wanted if n.endswith("codes")]  # type: ignore[attr-defined]
        assert codes == ["inner.2.codes"]


def test_a_package_without_its_weights_is_never_called(package: bytes) -> None:
    found = Package(package)
    with pytest.raises(RuntimeError, match="no weights yet"):
        found(torch.zeros(1, 2, 64))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda table: table.pop("inner.0.bias"), "weights lack inner.0.bias"),
        (
            lambda table: table.update({"inner.0.bias": ["weights", "2.bias", "float32", [48]]}),
            r"inner.0.bias is \['float32', \[32\]\], and the package needs \['float32', \[48\]\]",
        ),
        (lambda table: table.update({"inner.0.bias": ["weights", "no"]}), "table of weights"),
    ],
)
def test_weights_that_are_not_the_packages_are_refused(
    weightless: Made, change: Callable[[dict[str, Any]], Any], sentence: str
) -> None:
    engine = weightless.engine()
    table = json.loads(bytes(engine.files["table"]))
    change(table)
    engine.files = {**engine.files, "table": json.dumps(table).encode()}
    with pytest.raises(BundleError, match=sentence), engine:
        pass


def repacked(package: bytes, change: Callable[[dict[str, bytes]], None]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    change(content)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, raw in content.items():
            archive.writestr(name, raw)
    return out.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        "model/data/aotinductor/model/more.wrapper.so.py",
        "model/data/aotinductor/model/../../../escape.so",
        "/tmp/absolute.so",
        "model/data/weights/weight_0",
        "model/data/aotinductor/other/library.so",
        "model/data/aotinductor/model/second.wrapper.so",
        "other/archive_version",
    ],
)
def test_a_package_with_an_unexpected_file_is_refused_unread(
    weightless: Made, package: bytes, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    strange = repacked(package, lambda content: content.update({name: b"x"}))
    never = pytest.fail
    monkeypatch.setattr("runners.engines.aoti_package.Package.__init__", lambda *_: never("loaded"))
    engine = weightless.engine()
    engine.files = {**engine.files, "package": strange}
    with pytest.raises(BundleError, match="nothing is loaded"), engine:
        pass


def test_a_packed_bomb_is_refused() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data/aotinductor/model/x.wrapper.so", b"\0" * (1 << 20))
    with pytest.raises(BundleError, match="packed otherwise"):
        scan_package(out.getvalue())


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_truncated_package_is_refused(package: bytes, kept: float) -> None:
    short = package[: int(kept if kept > 1 else kept * len(package))]
    with pytest.raises(BundleError, match="can't be read"):
        scan_package(short)


@pytest.fixture
def platform_of(package: bytes, weightless: Made) -> Callable[..., None]:
    metadata = scan_package(package)

    def check(there: dict[str, str] | None = None, **changed: str) -> None:
        require_platform({**weightless.properties, **changed}, {**metadata, **(there or {})})

    return check


def test_what_it_was_built_for_is_compared_before_it_is_loaded(
    platform_of: Callable[..., None],
) -> None:
    platform_of()
    cpu = read_cpu().name
    for changed, words in (
        ({"torch": "2.11.0"}, ("torch 2.11.0", torch.__version__, "pip install")),
        ({"isa": "amx_never,avx2"}, ("amx_never,avx2", f"{cpu} lacks amx_never")),
        ({"there": {"AOTI_MACHINE": "aarch64"}}, ("linux aarch64", "linux x86_64")),
    ):
        with pytest.raises(DeviceMismatch) as caught:
            platform_of(**changed)
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_its_needs_are_in_words_that_machines_are_described_by(weightless: Made) -> None:
    from profiles.hardware import ISA

    assert set(str(weightless.properties["isa"]).split(",")) <= set(ISA)
    assert weightless.properties["torch"] == torch.__version__.partition("+")[0]
    assert needed_glibc(b"..GLIBC_2.4..GLIBC_2.34..GLIBC_2.5..") == "2.34"


def test_the_sources_and_where_they_were_built_are_not_in_it(package: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".cpp", ".h"))]


def test_weights_are_read_where_they_lie() -> None:
    raw = bytearray(safetensors.torch.save({"a": torch.arange(4.0), "b": torch.ones(2).half()}))
    found = read_tensors(raw)
    assert found["a"].tolist() == [0, 1, 2, 3]
    raw[:] = raw[:-2] + b"\0\0"
    assert found["b"].tolist() == [1, 0]
    for broken in (raw[:20], b"\xff" * 16, raw[:-1]):
        with pytest.raises(BundleError, match="can't be read"):
            read_tensors(bytes(broken))
