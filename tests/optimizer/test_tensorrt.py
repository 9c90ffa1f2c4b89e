"""TensorRT-RTX engines for cards that aren't here: built, and proved as far as that goes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from optimizer.backends import How
from optimizer.progress import Progress
from profiles.errors import BuildError
from runners.bundle import open_bundle, read_manifest
from runners.engines.tensorrt_plan import read_header
from tests.conftest import SETTINGS
from tests.tiny_pipelines import tiny_controlnet

pytest.importorskip("tensorrt_rtx")

Kiln = Callable[..., Any]
MakeBundle = Callable[..., Path]
CARDS = "sm86,sm89,sm120"
COMPONENTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")


@pytest.mark.parametrize(
    "quant", ["int8", *(pytest.param(quant, marks=pytest.mark.slow) for quant in ("none", "int4"))]
)
def test_every_component_builds_for_three_architectures_at_once(
    bundle: MakeBundle, quant: str
) -> None:
    found = open_bundle(bundle("tensorrt-rtx", quant, "fp16", CARDS))
    assert {entry.name for entry in found.manifest.components} == set(COMPONENTS)
    for entry in found.manifest.components:
        header = read_header(found.file(entry.files["engine"]))
        assert header is not None
        assert header.capabilities == entry.requires.capabilities == ("8.6", "8.9", "12.0")
        assert header.version == entry.properties["version"]
        assert (entry.ran, entry.load_seconds) == (False, None)
        assert entry.selftest in found.manifest.files
        assert entry.sqnr_db is not None
        assert entry.oracle_sqnr_db is not None
    assert found.manifest.speed is None


@pytest.mark.parametrize(
    ("quant", "cards", "least"),
    [
        ("fp8", "sm89,sm120", 0.5),
        pytest.param("nvfp4", "sm120", 0.0, marks=pytest.mark.slow),
    ],
)
def test_small_floats_build_for_the_architectures_that_have_them(
    bundle: MakeBundle, quant: str, cards: str, least: float
) -> None:
    """TensorRT-RTX 1.7 expands nvfp4 weights in a kernel of their own: the product is fp16's."""
    found = open_bundle(bundle("tensorrt-rtx", quant, "fp16", cards))
    entry = found.manifest.component("denoiser")
    header = read_header(found.file(entry.files["engine"]))
    assert header is not None
    assert [f"sm{name.replace('.', '')}" for name in header.capabilities] == cards.split(",")
    assert entry.layers_low_bit is not None
    assert entry.layers_low_bit > least * entry.layers_quantized


def test_each_layer_that_rounds_its_inputs_is_seen_on_an_8_bit_kernel(bundle: MakeBundle) -> None:
    entry = read_manifest(bundle("tensorrt-rtx", "int8", "fp16", CARDS)).component("denoiser")
    policy = read_manifest(bundle("tensorrt-rtx", "int8", "fp16", CARDS)).policies["unet"]
    assert not any(rule["scheme"].get("zero_point") for rule in policy["rules"])
    assert entry.layers_low_bit is not None
    weight_only = sum(rule["scheme"]["kind"] == "w8a16" for rule in policy["rules"])
    assert weight_only
    assert 0.8 * entry.layers_quantized < entry.layers_low_bit <= entry.layers_quantized


@pytest.mark.slow
def test_weights_of_few_bits_shrink_the_engine(bundle: MakeBundle) -> None:
    """Kernels weigh four times as much as this model's weights; the benchmark has a full size."""
    none, few = (
        read_manifest(bundle("tensorrt-rtx", quant, "fp16", CARDS)).component("denoiser")
        for quant in ("none", "int4")
    )
    assert few.engine_bytes < none.engine_bytes


Build = Callable[..., bytes]


@pytest.fixture
def build(bundle: MakeBundle, tmp_path: Path) -> Build:
    """`build(folder, **how)`: the tiny VAE decoder's engine, of the graph in `tmp_path`/source."""
    from optimizer.backends import tensorrt as builder

    made = bundle("tensorrt-rtx", "int8", "fp16", CARDS)
    entry = read_manifest(made).component("vae_decoder")
    latent = entry.signature.inputs[0]
    for path in sorted(Path(os.environ["KILN_CACHE"]).glob("v2/prepared/*/model.onnx")):
        graph = onnx.load(path, load_external_data=False).graph
        shapes = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in graph.input
        }
        found = shapes.get(latent.name, [])
        if list(shapes) == [latent.name] and found[1] == latent.axes[1]:  # others have 16 channels
            shutil.copytree(path.parent, tmp_path / "source")
            break

    def run(folder: str, progress: Progress = lambda _done, _total: None, **changed: Any) -> bytes:
        out = tmp_path / folder
        out.mkdir()
        given = {"dtype": "fp16", "capabilities": ("8.6",), **changed}
        how = How(
            "tensorrt-rtx",
            role=entry.role,
            wrapper=entry.wrapper,
            signature=entry.signature,
            **given,
        )
        built = builder.build(tmp_path / "source", out, how, progress)
        assert {path.name for path in out.iterdir()} == set(built.files.values())
        return (out / "engine.plan").read_bytes()

    return run


def test_the_same_graph_gives_the_same_engine_again_and_says_how_far_it_is(build: Build) -> None:
    """To the byte, but for numbers that the library gives in the order of addresses: of 96 builds
    of this graph 14 differed, in up to 14 of 3 million bytes; none of 14 did in processes without
    address randomization (setarch -R). Other weights, tactics or shapes differ in thousands.
    """
    seen: list[float] = []
    first = build("a", lambda done, total: seen.append(done / total))
    second = build("b")
    assert len(first) == len(second)
    assert sum(a != b for a, b in zip(first, second, strict=True)) < 100
    assert seen[-1] == 1
    assert all(0 <= share <= 1 for share in seen)


@pytest.mark.parametrize(
    "changed", [{"dtype": "bf16"}, {"weight_streaming": True}, {"capabilities": ()}], ids=str
)
def test_bf16_streamed_weights_and_portable_engines_build(
    build: Build, changed: dict[str, Any]
) -> None:
    header = read_header(build("out", **changed))
    assert header is not None
    if changed.get("capabilities") == ():
        assert {"8.0", "8.6", "8.9", "12.0"} <= set(header.capabilities)
    else:
        assert header.capabilities == ("8.6",)


def test_a_form_takes_low_rank_matrices_beside_a_convolution(tmp_path: Path) -> None:
    """Of ranks from 2 on, in an engine of its own; what it computes, the proof's graph does."""
    import numpy as np
    import onnx_ir as ir
    import onnxruntime
    import torch

    from optimizer.backends import tensorrt as builder
    from optimizer.forms import save_form
    from optimizer.lora_graph import add_low_rank
    from optimizer.onnx_files import read_graph
    from runners.lora_inputs import Target, with_lora
    from runners.signature import Dim, Signature, TensorSpec
    from tests.optimizer.test_lora_graph import KERNEL, convolution_graph, drawn

    sides = (Dim(name="height", min=8, opt=8, max=16), Dim(name="width", min=8, opt=8, max=16))
    plain = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", axes=("batch", 5, "height", "width")),),
        outputs=(TensorSpec(name="y", dtype="float32", axes=("batch", 7, "height", "width")),),
        dims=(Dim(name="batch", min=1, opt=2, max=4), *sides),
    )
    (tmp_path / "out").mkdir()
    whole = ir.from_proto(convolution_graph(1))
    ir.save(whole, tmp_path / "model.onnx", external_data="model.onnx.data")
    (tmp_path / "model.onnx.data").touch()
    model = read_graph(tmp_path / "model.onnx")
    targets = add_low_rank(model, {"c": Target(5, 7, (3, 3))}, {})
    save_form("lora", with_lora(plain, targets), tmp_path, model)
    how = How("tensorrt-rtx", "fp16", "denoiser", "unet", plain, capabilities=("8.6",))

    built = builder.build_form(tmp_path, tmp_path / "out", how, "lora")
    assert built.files == {"engine": "lora.plan"}
    header = read_header((tmp_path / "out" / "lora.plan").read_bytes())
    assert header is not None
    assert header.capabilities == ("8.6",)
    (ranges,) = builder._profiles(replace(how, signature=with_lora(plain, targets)))
    assert [shape[1] for shape in ranges["c.lora_A"]] == [2, 32, 4096]

    proof = builder.prove(tmp_path, tmp_path, how, "lora")
    session = onnxruntime.InferenceSession(tmp_path / proof["graph"])
    x, down, up = drawn(2, 5, 8, 11), drawn(5, 3, 3, 3), drawn(3, 7)
    (found,) = session.run(["y"], {"x": x, "c.lora_A": down, "c.lora_B": up})
    kernel = torch.from_numpy(KERNEL + np.einsum("irhw,ro->oihw", down, up))
    wanted = torch.nn.functional.conv2d(torch.from_numpy(x), kernel, padding=1).numpy()
    assert np.abs(found - wanted).max() < 0.01 * np.abs(wanted).max()  # fp16


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_engines_that_take_loras_and_control_networks_build(
    bundle: MakeBundle, tiny_model: Path, tmp_path: Path, quant: str
) -> None:
    """Their graphs were compared with fp32, the controlled one on recorded residuals."""
    network = tiny_controlnet(tmp_path / "network", tiny_model)
    made = bundle("tensorrt-rtx", quant, "fp16", CARDS, controlnets=(network,), lora=True)
    entry = open_bundle(made).manifest.component("denoiser")
    assert set(entry.forms) == {"lora", "control", "control+lora"}
    names = [form.files["engine"] for form in (entry, *entry.forms.values())]
    assert len(set(names)) == 4
    for name in names:
        header = read_header((made / name).read_bytes())
        assert header is not None
        assert header.capabilities == ("8.6", "8.9", "12.0")


def test_what_the_library_cannot_read_is_said_in_its_own_words(
    build: Build, tmp_path: Path
) -> None:
    path = tmp_path / "source" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Sigmoid").op_type = "Bernoulli"
    onnx.save(model, path)
    with pytest.raises(BuildError) as caught:
        build("out")
    assert "tensorrt-rtx can't read the exported graph: Bernoulli at " in str(caught.value)
    assert caught.value.log


def test_a_missing_library_is_named_with_the_command_that_installs_it(
    kiln: Kiln, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimizer import tools

    monkeypatch.setattr(tools, "find_spec", lambda name: None if "tensorrt" in name else name)
    ended = kiln("compile", tiny_model, "--target", "sm86", "-o", tmp_path / "out")
    assert ended.code == 17
    assert 'run pip install "kiln-diffusion[compile,rtx]"' in ended.sentence


def test_an_engine_is_refused_where_there_is_no_card(
    kiln: Kiln, bundle: MakeBundle, tmp_path: Path
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    made = bundle("tensorrt-rtx", "int8", "fp16", CARDS)
    ended = kiln("generate", made, "--prompt", "a", "-o", tmp_path / "a.png")
    assert ended.code == 10
    assert ended.sentence == (
        "Error: The engine needs sm86, sm89, sm120, and no NVIDIA card is usable here: "
        "check the driver with nvidia-smi, or compile for this machine without --target."
    )


def test_inspect_says_that_it_has_not_run(kiln: Kiln, bundle: MakeBundle) -> None:
    shown = kiln("inspect", bundle("tensorrt-rtx", "int8", "fp16", CARDS)).out
    assert "built for  sm86, sm89, sm120; built: yes, run: not yet" in shown


def test_another_version_of_the_library_is_refused(bundle: MakeBundle) -> None:
    from profiles.errors import DeviceMismatch
    from runners.engines.tensorrt import TensorRtEngine

    entry = read_manifest(bundle("tensorrt-rtx", "int8", "fp16", CARDS)).component("denoiser")
    with pytest.raises(DeviceMismatch) as caught:
        TensorRtEngine.require_here({**entry.properties, "version": "1.6.0.1"})
    assert "built by tensorrt_rtx 1.6.0.1 and 1.7.1.116 is installed" in str(caught.value)


def test_an_engine_goes_as_far_as_it_can_without_a_driver(
    bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library takes the verified mapping, and says itself that there is no driver."""
    import torch

    from profiles.errors import BundleError
    from runners.engines.tensorrt import TensorRtEngine
    from runners.pipeline import open_engine

    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    found = open_bundle(bundle("tensorrt-rtx", "int8", "fp16", CARDS))
    engine = open_engine(found, found.manifest.component("denoiser"), threads=1)
    monkeypatch.setattr(TensorRtEngine, "require_here", lambda _self, _properties: None)
    with pytest.raises(BundleError) as caught:
        engine.__enter__()
    assert "tensorrt_rtx can't load the engine: " in str(caught.value)
    assert "CUDA driver version is insufficient" in str(caught.value)


def test_a_file_that_contradicts_the_manifest_is_not_loaded(
    bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from profiles.errors import BundleError
    from runners.engines.tensorrt import TensorRtEngine

    found = open_bundle(bundle("tensorrt-rtx", "int8", "fp16", CARDS))
    entry = found.manifest.component("denoiser")
    monkeypatch.setattr(TensorRtEngine, "require_here", lambda _self, _properties: None)
    cut = bytes(found.file(entry.files["engine"]))[:-1]
    engine = TensorRtEngine(
        {"engine": cut}, signature=entry.signature, properties=entry.properties, threads=1
    )
    with pytest.raises(BundleError, match="The engine's file says version"):
        engine.__enter__()


UNEXECUTED = {
    "_engine": (
        "ICudaEngine",
        {
            "create_execution_context",
            "create_runtime_config",
            "device_memory_size_v2",
            "get_tensor_profile_shape",
            "num_optimization_profiles",
            "streamable_weights_size",
            "weight_streaming_budget_v2",
        },
    ),
    "_context": (
        "IExecutionContext",
        {
            "execute_async_v3",
            "get_tensor_shape",
            "set_device_memory",
            "set_input_shape",
            "set_optimization_profile_async",
            "set_tensor_address",
            "update_device_memory_size_for_shapes",
        },
    ),
    "config": (
        "IRuntimeConfig",
        {
            "create_runtime_cache",
            "cuda_graph_strategy",
            "set_execution_context_allocation_strategy",
            "set_runtime_cache",
        },
    ),
    "refitter": ("Refitter", {"get_missing_weights", "refit_cuda_engine", "set_named_weights"}),
    "_kernels": ("IRuntimeCache", {"deserialize", "serialize"}),
}
"""What of the library's API no machine of ours has executed: it needs a driver."""

ALIASES = {"engine": "_engine", "context": "_context"}


def test_what_needs_a_driver_is_listed_and_is_there_in_the_library() -> None:
    import ast
    import inspect

    import tensorrt_rtx as trt

    from runners.engines import tensorrt

    used: dict[str, set[str]] = {name: set() for name in UNEXECUTED}
    for node in ast.walk(ast.parse(inspect.getsource(tensorrt))):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            name = ALIASES.get(name, name)
            if name in used:
                used[name].add(node.attr)
    assert used == {name: calls for name, (_, calls) in UNEXECUTED.items()}
    for kind, calls in UNEXECUTED.values():
        assert calls <= set(dir(getattr(trt, kind)))


def test_the_plan_says_what_the_backend_gets_instead(kiln: Kiln, tiny_model: Path) -> None:
    how = ("compile", tiny_model, "--target", "rtx-4090", "--dry-run")
    assert "takes no zero points: inputs are rounded around 0" in kiln(*how).out
    assert "takes no convolutions in 4 bits: they get 8" in kiln(*how, "--quant", "int4").out
    document = json.loads(kiln(*how, "--json").out)
    assert document["recipe"]["backend"] == "tensorrt-rtx"
    assert document["recipe"]["dtype"] == "fp16"
    assert document["profile"] == "nvidia-rtx"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--target", "rtx-4091"), 2, "rtx-4090"),
        (("--target", "sm90"), 10, "tensorrt-rtx doesn't build for sm90: it builds for sm75"),
        (("--target", "sm86", "--quant", "fp8"), 10, "can't be fp8: sm86 has no fp8"),
        (("--target", "rtx-3090,sm89", "--quant", "fp8"), 10, "leave it out of --target"),
        (("--target", "sm75", "--dtype", "bf16"), 10, "sm75, which has no bf16 products"),
        (("--target", "sm86", "--backend", "openvino"), 10, "use --backend tensorrt-rtx"),
        (("--backend", "tensorrt-rtx"), 10, "name them with --target"),
        (("--target", "sm86", "--dtype", "fp32"), 10, "use fp16 or bf16"),
        (("--target", "sm86", "--quant", "nf4"), 10, "tensorrt-rtx doesn't read nf4"),
    ],
)
def test_what_cannot_be_built_is_refused_in_the_plan(
    kiln: Kiln, tiny_model: Path, arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    ended = kiln("compile", tiny_model, "--dry-run", *arguments)
    assert ended.code == code, ended.err
    assert sentence in ended.sentence


@pytest.mark.parametrize(
    ("scheme", "sentence"),
    [
        ({"kind": "w8a8"}, "takes no zero points; set zero_point to false"),
        ({"kind": "w4a16"}, "takes no convolutions in 4 bits; set linears_only to true"),
    ],
)
def test_a_policy_that_asks_for_the_impossible_is_refused_with_the_layers_name(
    kiln: Kiln, tiny_model: Path, tmp_path: Path, scheme: dict[str, str], sentence: str
) -> None:
    recipe = {
        "model": str(tiny_model),
        "target": "sm86",
        "quant": "auto",
        "budget": "0.5x",
        "policy": {"rules": [{"pattern": "*resnets.0.conv1", "scheme": scheme}]},
        **SETTINGS,
    }
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    ended = kiln("compile", "--recipe", path, "--dry-run")
    assert ended.code == 10
    assert "down_blocks.0.resnets.0.conv1 can't be" in ended.sentence
    assert sentence in ended.sentence


def test_too_little_memory_for_the_builder_is_refused_before_anything_runs(
    kiln: Kiln, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from profiles import hardware

    poor = hardware.detect().model_copy(update={"ram_available_bytes": 1 << 20})
    monkeypatch.setattr(hardware, "detect", lambda: poor)
    ended = kiln("compile", tiny_model, "--target", "sm86", "-o", tmp_path / "out")
    assert ended.code == 13
    assert "and 0.0 are free: close other programs" in ended.sentence
    assert not (tmp_path / "out").exists()
