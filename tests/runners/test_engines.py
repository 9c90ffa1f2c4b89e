"""The contract of every engine: a new line of the table is tested by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizer.backends import BACKENDS
from optimizer.check import limit_db
from optimizer.numerics import EXACT_DB, sqnr_db
from profiles.errors import BundleError, MissingError, SpecError
from runners.bundle import Bundle, open_bundle, read_manifest
from runners.engines import ENGINES, engine_class
from runners.engines.base import Array, Engine
from runners.lora_inputs import lora_targets
from runners.manifest import ComponentEntry
from runners.pipeline import open_engine
from tests.conftest import HERE

MakeBundle = Callable[..., Path]
ROLES = ("text_encoder", "denoiser", "vae_decoder", "vae_encoder")


def test_every_engine_has_its_builder() -> None:
    assert set(BACKENDS) == set(ENGINES)


def sizes(entry: ComponentEntry, batch: int, height: float, width: float) -> dict[str, int]:
    """Legal sizes, in parts of the range from its optimum (1) to its maximum (2)."""
    factors = {"batch": batch, "height": height, "width": width, "tokens": height}
    return {
        dim.name: batch if dim.name == "batch" else dim.nearest(round(dim.opt * factors[dim.name]))
        for dim in entry.signature.dims
    }


def feeds(entry: ComponentEntry, size: dict[str, int], *, seed: int = 0) -> dict[str, Array]:
    """Values as a denoising run has them: unit noise, a timestep, small token ids."""
    rng = np.random.default_rng(seed)
    found = {}
    for spec in entry.signature.inputs:
        shape = tuple(size[axis] if isinstance(axis, str) else axis for axis in spec.axes)
        if spec.dtype == "int64":
            found[spec.name] = rng.integers(0, 70, shape)
        elif spec.name == "time_features":
            found[spec.name] = np.full(shape, 501, np.float32)
        else:
            found[spec.name] = rng.standard_normal(shape, np.float32)
    return found


@pytest.fixture(scope="module")
def opened(bundle: MakeBundle) -> Iterator[Callable[..., tuple[Engine, ComponentEntry]]]:
    """`opened(backend, role, quant, dtype)`: an open engine of the tiny model and its entry."""
    engines: dict[tuple[str, ...], tuple[Engine, ComponentEntry]] = {}
    bundles: dict[tuple[str, ...], Bundle] = {}

    def get(
        backend: str, role: str, quant: str = "none", dtype: str = "fp32"
    ) -> tuple[Engine, ComponentEntry]:
        how = (backend, quant, dtype)
        if how not in bundles:
            bundles[how] = open_bundle(bundle(*how))
        if (*how, role) not in engines:
            entry = bundles[how].manifest.component(role)
            engine = open_engine(bundles[how], entry, threads=1).__enter__()
            engines[*how, role] = engine, entry
        return engines[*how, role]

    yield get
    for engine, _ in engines.values():
        engine.close()


Opened = Callable[..., tuple[Engine, ComponentEntry]]


def first_output(engine: Engine, given: dict[str, Array]) -> Array:
    return engine(given)[engine.signature.outputs[0].name]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("backend", HERE)
def test_an_engine_agrees_with_the_fp32_module_at_two_sizes_in_turn(
    opened: Opened, tiny_model: Path, backend: str, role: str
) -> None:
    """At least what compile demands of fp32, 79 dB; no NaN; the sizes take turns."""
    from optimizer.calls import Call
    from optimizer.load import load_module
    from optimizer.prepare import run_module
    from optimizer.source import resolve
    from runners.modules import WRAPPERS

    engine, entry = opened(backend, role)
    folder = "vae" if role.startswith("vae") else {"denoiser": "unet"}.get(role, role)
    wrapper = WRAPPERS[entry.wrapper](load_module(resolve(str(tiny_model)), folder))
    for seed, size in enumerate([(2, 1.0, 1.5), (1, 1.75, 0.5), (2, 1.0, 1.5)]):
        given = feeds(entry, sizes(entry, *size), seed=seed)
        inputs = tuple(given[spec.name] for spec in entry.signature.inputs)
        wanted = run_module(wrapper, Call(inputs, ())).outputs
        outputs = engine(given)
        assert list(outputs) == [spec.name for spec in entry.signature.outputs]
        for found, reference in zip(outputs.values(), wanted, strict=True):
            assert found.dtype == np.float32
            assert found.shape == reference.shape
            assert np.isfinite(found).all()
            assert sqnr_db([(reference, found)]) >= limit_db(EXACT_DB, "fp32")


def test_bf16_costs_what_bf16_may(opened: Opened, has_bf16: bool) -> None:
    """At least 27 dB, as check.py says: 28 for the dtype, and 1."""
    if not has_bf16:
        pytest.skip("the processor has no bf16 products")
    exact, entry = opened("openvino", "denoiser")
    engine, rounded = opened("openvino", "denoiser", "none", "bf16")
    assert rounded.properties["INFERENCE_PRECISION_HINT"] == "bf16"
    assert rounded.engine_bytes < 0.51 * entry.engine_bytes
    for size in ((2, 1.0, 1.5), (1, 1.75, 0.5)):
        given = feeds(entry, sizes(entry, *size))
        wanted, found = first_output(exact, given), first_output(engine, given)
        assert limit_db(EXACT_DB, "bf16") <= sqnr_db([(wanted, found)]) < 80


@pytest.mark.parametrize("backend", [name for name in HERE if name != "eager"])
def test_a_quantized_engine_loses_what_the_oracle_loses(opened: Opened, backend: str) -> None:
    """At most 1 dB more, as check.py says, on the same feeds.

    Engine and oracle aren't compared with each other: sums in another order flip a few roundings,
    each flip more of them in the layers below, so their errors are as good as drawn twice. What
    one layer computes is compared in test_graph.py, where nothing has piled up yet.
    """
    exact, _ = opened("eager", "denoiser")
    oracle, entry = opened("eager", "denoiser", "int8")
    engine, _ = opened(backend, "denoiser", "int8")
    for size in ((2, 1.0, 1.0), (1, 1.75, 0.5)):
        given = feeds(entry, sizes(entry, *size))
        wanted = first_output(exact, given)
        lost = sqnr_db([(wanted, first_output(oracle, given))])
        assert 20 < lost < 60
        assert sqnr_db([(wanted, first_output(engine, given))]) >= limit_db(lost, "fp32")


def low_rank(entry: ComponentEntry, rank: int, seed: int) -> dict[str, Array]:
    """LoRA inputs of every layer, of a size that changes what comes out."""
    rng, found = np.random.default_rng(seed), {}
    for name, target in lora_targets(entry.forms["lora"].signature).items():
        down = rng.standard_normal((target.inputs, rank, *target.kernel), np.float32)
        up = rng.standard_normal((rank, target.outputs), np.float32)
        found |= {f"{name}.lora_A": 0.1 * down, f"{name}.lora_B": 0.1 * up}
    return found


@pytest.mark.parametrize("backend", HERE)
def test_held_inputs_are_in_every_call_until_others_are(bundle: MakeBundle, backend: str) -> None:
    """Two sizes in turn: an engine may have something of its own for each."""
    found = open_bundle(bundle(backend, lora=True))
    entry = found.manifest.component("denoiser")
    calls = [feeds(entry, sizes(entry, *size)) for size in ((2, 1.0, 1.0), (1, 1.75, 0.5))]
    loras = [low_rank(entry, rank, seed=rank) for rank in (2, 3, 0)]
    with open_engine(found, entry, form="lora", threads=1) as engine:
        wanted = [[first_output(engine, {**call, **lora}) for call in calls] for lora in loras]
        assert sqnr_db([(wanted[0][0], wanted[1][0])]) < 60
        for lora, outputs in zip(loras, wanted, strict=True):
            engine.hold(lora)
            for call, output in [*zip(calls, outputs, strict=True)] * 2:
                np.testing.assert_array_equal(first_output(engine, call), output)


def test_low_rank_inputs_in_bf16_are_what_the_engine_rounds_them_to(
    bundle: MakeBundle, has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the same engine, whose inputs are fp32 and rounded at each step."""
    from runners.engines import openvino

    if not has_bf16:
        pytest.skip("the processor has no bf16 products")
    found = open_bundle(bundle("openvino", lora=True))
    entry = found.manifest.component("denoiser")
    form = entry.forms["lora"]
    given = feeds(entry, sizes(entry, 2, 1.0, 1.0)) | low_rank(entry, 3, seed=0)
    untouched = next(iter(lora_targets(form.signature)))
    given[f"{untouched}.lora_A"] = given[f"{untouched}.lora_A"][:, :0]
    given[f"{untouched}.lora_B"] = given[f"{untouched}.lora_B"][:0]
    outputs = []
    for rounded in (True, False):
        if not rounded:
            monkeypatch.setattr(openvino, "_taking_bf16", lambda model, _inputs: model)
            monkeypatch.setattr(openvino, "_rounded", openvino.ov.Tensor)
        files = {role: found.file(name) for role, name in form.files.items()}
        properties = {**form.properties, "INFERENCE_PRECISION_HINT": "bf16"}
        with engine_class("openvino")(
            files, signature=form.signature, properties=properties, threads=1
        ) as engine:
            outputs.append(first_output(engine, given))
    assert sqnr_db([(outputs[1], outputs[0])]) > 60  # bf16 alone is at 28 and more


@pytest.mark.parametrize("backend", HERE)
def test_feeds_are_checked_before_they_reach_the_library(opened: Opened, backend: str) -> None:
    engine, entry = opened(backend, "denoiser")
    given = feeds(entry, sizes(entry, 1, 1.0, 1.0))
    sample = given["sample"]
    for wrong, sentence in (
        ({**given, "sample": sample.astype(np.float64)}, "sample must be float32, and is float64"),
        ({**given, "sample": sample[0]}, "sample has 3 axes, and the engine takes 4"),
        ({**given, "sample": sample[:, :3]}, "sample needs 4 where it has 3"),
        (
            {name: given[name] for name in ("sample", "time_features")},
            "and got ['sample', 'time_features']",
        ),
        ({**given, "sample": sample[..., :-1]}, "width 15, and the engine was compiled for"),
        ({**given, "sample": sample[..., :-1]}, "use 16, or compile with a wider range"),
        (
            {**given, "sample": sample[:, :, :2]},
            "height 2, and the engine was compiled for 8 to 32",
        ),
    ):
        with pytest.raises(SpecError) as caught:
            engine(wrong)
        assert sentence in str(caught.value)


@pytest.mark.parametrize("backend", HERE)
def test_arrays_that_are_not_contiguous_are_taken(opened: Opened, backend: str) -> None:
    engine, entry = opened(backend, "denoiser")
    given = feeds(entry, sizes(entry, 1, 1.0, 1.0))
    turned = {**given, "sample": given["sample"].transpose(0, 1, 3, 2).copy().transpose(0, 1, 3, 2)}
    assert not turned["sample"].flags.c_contiguous
    np.testing.assert_array_equal(first_output(engine, turned), first_output(engine, given))


@pytest.mark.parametrize("backend", HERE)
def test_outputs_are_the_callers_to_keep(opened: Opened, backend: str) -> None:
    engine, entry = opened(backend, "denoiser")
    size = sizes(entry, 1, 1.0, 1.0)
    first = first_output(engine, feeds(entry, size))
    kept = first.copy()
    first_output(engine, feeds(entry, size, seed=1))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("backend", HERE)
def test_the_same_feeds_give_the_same_bytes(opened: Opened, backend: str) -> None:
    engine, entry = opened(backend, "denoiser", "int8")
    given = feeds(entry, sizes(entry, 2, 1.0, 1.0))
    assert first_output(engine, given).tobytes() == first_output(engine, given).tobytes()


def reopened(bundle: Path, **properties: Any) -> Engine:
    """The text encoder's engine with other properties than the manifest's."""
    found = open_bundle(bundle)
    entry = found.manifest.component("text_encoder")
    changed = entry.model_copy(update={"properties": {**entry.properties, **properties}})
    return open_engine(found, changed, threads=1)


@pytest.mark.parametrize("backend", HERE)
def test_a_closed_engine_does_not_run_and_closes_twice(bundle: MakeBundle, backend: str) -> None:
    engine = reopened(bundle(backend))
    with pytest.raises(RuntimeError, match="not open"):
        engine({})
    with engine:
        pass
    engine.close()
    with pytest.raises(RuntimeError, match="not open"):
        engine({})


@pytest.mark.parametrize("backend", HERE)
def test_a_property_of_the_manifest_that_cannot_be_set_is_an_error(
    bundle: MakeBundle, backend: str
) -> None:
    entry = open_bundle(bundle(backend)).manifest.component("text_encoder")
    assert entry.properties
    for name in entry.properties:
        with (
            pytest.raises(BundleError, match=r"can't .* the engine"),
            reopened(bundle(backend), **{name: "no-such-value"}) as engine,
        ):
            engine(feeds(entry, {"batch": 1}))


def test_a_property_that_comes_back_other_than_set_is_an_error() -> None:
    Engine._same("HINT", "bf16", "BF16")
    with pytest.raises(BundleError) as caught:
        Engine._same("HINT", "f32", "bf16")
    sentence = "The engine property HINT must be f32 and is bf16 after opening"
    assert str(caught.value).startswith(sentence)
    assert "compile again" in str(caught.value)


def test_openvino_reads_back_the_manifests_properties(opened: Opened) -> None:
    engine, entry = opened("openvino", "denoiser", "int8")
    given = feeds(entry, sizes(entry, 1, 1.0, 1.0))
    compiled = engine.compile(  # type: ignore[attr-defined]
        {name: array.shape for name, array in given.items()}
    )
    assert entry.properties["INFERENCE_PRECISION_HINT"] == "f32"
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0


@pytest.mark.parametrize(
    ("backend", "quant"),
    [
        ("onnxruntime", "int4"),
        pytest.param("eager", "int4", marks=pytest.mark.slow),
        ("eager", "nf4"),
        ("eager", "fp8"),
        ("eager", "int8-dyn"),
        ("eager", "llm-int8"),
    ],
)
def test_a_level_loses_on_every_backend_what_the_oracle_loses(
    bundle: MakeBundle, backend: str, quant: str
) -> None:
    """Within 1 dB."""
    entry = read_manifest(bundle(backend, quant)).component("denoiser")
    assert entry.quant == quant
    assert entry.sqnr_db is not None
    assert entry.oracle_sqnr_db is not None
    assert 10 < entry.oracle_sqnr_db < 60
    assert entry.sqnr_db == pytest.approx(entry.oracle_sqnr_db, abs=1)
    if quant in ("int4", "nf4"):
        assert entry.engine_bytes < 0.25 * entry.fp32_bytes


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_floats_are_stored_in_16_bits_unless_the_engine_computes_in_fp32(
    bundle: MakeBundle, tmp_path: Path, quant: str
) -> None:
    """All but scalars: OpenVINO itself leaves the floats of a model with 4-bit constants alone."""
    import gzip

    import openvino as ov

    from optimizer.backends.openvino import FILES, save

    def floats(folder: Path) -> int:
        graph = gzip.decompress((folder / FILES["graph"]).read_bytes())
        weights = np.fromfile(folder / FILES["weights"], np.uint8)
        model = ov.Core().read_model(graph, ov.Tensor(weights))
        return sum(
            op.data.size
            for op in model.get_ops()
            if op.get_type_name() == "Constant"
            and op.get_element_type() == ov.Type.f32
            and op.data.size > 1
        )

    made = bundle("openvino", quant) / "unet"
    assert floats(made) > 1000
    graph = gzip.decompress((made / FILES["graph"]).read_bytes())
    model = ov.Core().read_model(graph, ov.Tensor(np.fromfile(made / FILES["weights"], np.uint8)))
    save(model, tmp_path, dtype="bf16")
    assert floats(tmp_path) < 100


def test_only_the_dynamic_level_lets_openvino_round_inputs_as_they_come(
    bundle: MakeBundle,
) -> None:
    groups = [
        read_manifest(bundle("openvino", quant))
        .component("denoiser")
        .properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"]
        for quant in ("int4", "int4-dyn")
    ]
    assert groups == [0, 32]


@pytest.mark.parametrize(
    ("backend", "quant", "form", "axes"),
    [
        ("openvino", "int8", "w8a8", (2, 4)),
        ("onnxruntime", "int4", "w4a16", (2,)),
        ("eager", "int8-dyn", "w8a16-dynamic", (2,)),
        ("eager", "llm-int8", "llm-int8", (2,)),
    ],
)
def test_a_backend_runs_on_low_bit_kernels_what_it_should(
    bundle: MakeBundle, tiny_model: Path, backend: str, quant: str, form: str, axes: tuple[int, ...]
) -> None:
    """Counted in OpenVINO's own runtime graph, at the native size, in ONNX Runtime's graph, and
    among eager's own layers.
    """
    from optimizer.load import load_module
    from optimizer.quantize.apply import planned_layers
    from optimizer.quantize.policy import Policy
    from optimizer.source import resolve

    manifest = read_manifest(bundle(backend, quant))
    policy = Policy.model_validate(manifest.policies["unet"])
    module = load_module(resolve(str(tiny_model)), "unet")
    schemes = planned_layers(module, policy)
    lowered = [
        name
        for name, scheme in schemes.items()
        if scheme.format == form and module.get_submodule(name).weight.dim() in axes  # type: ignore[union-attr,operator]
    ]
    entry = manifest.component("denoiser")
    assert entry.layers_quantized == len(schemes)
    assert entry.layers_low_bit is not None
    assert entry.layers_low_bit >= len(lowered) > 30


def test_an_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(SpecError) as caught:
        engine_class("tvm")
    assert str(caught.value) == f"The backend tvm is not known: use one of {', '.join(ENGINES)}."


def test_a_backend_whose_library_is_missing_names_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ENGINES, "absent", "no_such_library.engine:Engine")
    with pytest.raises(MissingError) as caught:
        engine_class("absent")
    assert "no_such_library, which isn't installed" in str(caught.value)
    assert 'pip install "kiln-diffusion[cpu]"' in str(caught.value)


@pytest.mark.parametrize("backend", HERE)
def test_broken_engine_files_are_a_bundle_error(bundle: MakeBundle, backend: str) -> None:
    """Bytes that pass the digests, because whoever wrote the manifest hashed them so."""
    found = open_bundle(bundle(backend))
    entry = found.manifest.component("text_encoder")
    files = dict.fromkeys(entry.files, b"\x1f\x8b garbage")
    engine = engine_class(backend)(
        files, signature=entry.signature, properties=entry.properties, threads=1
    )
    with pytest.raises(BundleError), engine:
        pass
