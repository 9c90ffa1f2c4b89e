"""Everything is decided and refused from configs and headers, before any weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimizer.compile import plan_recipe
from optimizer.plan import Plan, make_plan, with_policy
from optimizer.quantize.policy import Policy, Rule
from optimizer.quantize.schemes import W4A16
from optimizer.recipe import Recipe
from optimizer.requiring import requires_of
from optimizer.sizes import GRAPH_BYTES
from optimizer.source import resolve
from profiles import hardware, profile
from profiles.errors import SpecError, UnsupportedError
from profiles.hardware import INT8_DOT

Kiln = Callable[..., Any]
MakeBundle = Callable[..., Path]


def planned(model: Path, **fields: Any) -> Plan:
    return plan_recipe(Recipe.model_validate({"model": str(model), **fields}))[0]


def test_what_the_recipe_leaves_open_is_decided(tiny_model: Path) -> None:
    plan = planned(tiny_model)
    recipe = plan.recipe
    assert (recipe.size_min, recipe.size_max, recipe.batch) == (32, 256, 4)
    assert (plan.native_size, plan.size_step) == (64, 8)
    assert recipe.steps == 20
    assert recipe.digest == plan.source.digest
    machine = hardware.detect()
    chosen = profile.match(machine)
    assert recipe.profile == chosen.name
    assert recipe.backend == chosen.backends[0]
    assert recipe.quant == chosen.quant
    if machine.cpu.has_int8_dot and recipe.quant == "int8":
        assert any(job.layers for job in plan.jobs)


def test_recorded_runs_are_as_large_as_the_recipe_says(tiny_model: Path) -> None:
    assert planned(tiny_model).drawn_size == 64
    assert planned(tiny_model, size_min=72).drawn_size == 72
    assert planned(tiny_model, calibration_size=40).drawn_size == 40


def test_planning_twice_gives_the_same_plan(tiny_model: Path) -> None:
    first = planned(tiny_model, quant="int4")
    again = plan_recipe(first.recipe)[0]
    assert again.recipe == first.recipe
    assert again.jobs == first.jobs


def test_a_models_own_steps_and_guidance_are_used(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "kiln.json").write_text(json.dumps({"steps": 7, "guidance": 2.5, "other": 1}))
    plan = planned(model)
    assert plan.drawn.defaults == {"steps": 7, "guidance": 2.5}
    assert (plan.calibration.steps, plan.calibration.guidance) == (7, 2.5)
    assert planned(model, steps=3).calibration.steps == 3


def test_a_models_own_prompts_are_used_and_too_few_are_named(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "prompts").mkdir()
    prompts = model / "prompts" / "calibration.txt"
    prompts.write_text("\n".join(f"prompt {i}" for i in range(40)) + "\n\n")
    calibration = planned(model).calibration
    assert calibration.prompts[0] == "prompt 0"
    used = (calibration.covariance_prompts, calibration.trial, calibration.held_out)
    assert set(calibration.prompts) <= set(used[0])
    assert len({prompt for prompts in used for prompt in prompts}) == sum(map(len, used))
    assert set(calibration.all_prompts) == {prompt for prompts in used for prompt in prompts}
    prompts.write_text("one\n")
    with pytest.raises(SpecError, match=r"holds 1 different prompts, and \d+ are needed: add some"):
        planned(model)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"size_min": 60}, "The smallest side 60 is not a multiple of 8, which this model needs: "),
        ({"size_min": 60}, "use 64."),
        ({"size_max": 66}, "use 64."),
        ({"calibration_size": 36}, "use 40."),
        ({"size_max": 3}, "use 8."),
        ({"size_max": 24}, "The sizes 32 to 24 are backwards: give the smaller side first."),
        ({"profile": "x86-avx9"}, "no profile is called 'x86-avx9'"),
    ],
    ids=str,
)
def test_an_illegal_wish_names_a_legal_one(
    tiny_model: Path, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SpecError) as caught:
        planned(tiny_model, **fields)
    assert sentence in str(caught.value)


def test_a_dtype_that_no_cpu_backend_computes_names_those_it_does(tiny_model: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        planned(tiny_model, dtype="fp16", backend="openvino")
    assert str(caught.value) == (
        "--dtype fp16 can't be used with the backend openvino on a CPU: use fp32 or bf16."
    )


def test_bf16_is_refused_where_the_processor_lacks_it(tiny_model: Path) -> None:
    machine = hardware.detect()
    old = machine.model_copy(
        update={"cpu": machine.cpu.model_copy(update={"name": "An old one", "isa": ("avx2",)})}
    )
    source, fitting = resolve(str(tiny_model)), profile.match(old)
    recipe = Recipe(model=str(tiny_model), dtype="bf16", backend="openvino")
    with pytest.raises(UnsupportedError) as caught:
        make_plan(recipe, source, profile=fitting, hardware=old)
    assert "which An old one lacks: use --dtype fp32." in str(caught.value)
    auto = recipe.model_copy(update={"dtype": "auto"})
    assert make_plan(auto, source, profile=fitting, hardware=old).recipe.dtype == "fp32"


def test_another_model_than_the_recipes_is_refused(tiny_model: Path) -> None:
    with pytest.raises(SpecError, match="isn't the model that the recipe was made for"):
        planned(tiny_model, digest="0" * 64)


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_the_denoisers_predicted_bytes_are_within_5_percent(
    bundle: MakeBundle, tiny_model: Path, quant: str
) -> None:
    """Of the weights' file: a tiny model's graph is a large and less predictable part. Constants
    that the exporter adds, and layers that the prediction takes for whole groups, are what the 5 %
    are for.
    """
    folder = bundle("openvino", quant)
    plan = planned(tiny_model, quant=quant, backend="openvino", dtype="fp32")
    job = next(job for job in plan.jobs if job.spec.role == "denoiser")
    weights = (folder / "unet" / "weights.bin").stat().st_size
    graph = GRAPH_BYTES * len(plan.source.parameters("unet"))
    assert weights == pytest.approx(job.predicted_bytes - graph, rel=0.05)


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    kiln: Kiln, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "cache"))
    arguments = ("compile", tiny_model, "-o", tmp_path / "out", "--quant", "int8", "--dry-run")
    text, line = kiln(*arguments), kiln(*arguments, "--json")
    assert text.code == line.code == 0
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.parent.parent.name == "receipts" for path in written)
    for words in ("predicted: ", "GiB of memory", "81 of 83", "sides 32 to 256 px"):
        assert words in text.out
    document = json.loads(line.out)
    assert len(line.out.splitlines()) == 1
    assert document["predicted_memory_bytes"] > 0
    names = [component["name"] for component in document["components"]]
    assert names == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    for component in document["components"]:
        assert component["predicted_bytes"] > 0
        assert component["checks"]
    assert document["components"][1]["predicted_bytes"] < document["components"][1]["fp32_bytes"]


def test_a_format_that_the_backend_does_not_read_names_one_that_does(tiny_model: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        planned(tiny_model, quant="nf4", backend="openvino")
    assert str(caught.value) == (
        "down_blocks.0.attentions.0.proj_in can't be nf4: the backend openvino doesn't read nf4; "
        "use --backend eager, or another --quant."
    )
    assert planned(tiny_model, quant="nf4", backend="eager").denoiser.layers


def test_text_encoders_are_kept_unless_they_are_asked_for(tiny_model: Path) -> None:
    def levels(**fields: Any) -> dict[str, tuple[str, set[str]]]:
        jobs = planned(tiny_model, quant="none", backend="eager", **fields).jobs
        return {job.spec.name: (job.quant, {s.format for s in job.layers.values()}) for job in jobs}

    assert levels()["text_encoder"] == ("none", set())
    asked = levels(text_quant="int8w")
    assert asked["text_encoder"] == ("int8w", {"w8a16"})
    assert asked["unet"] == ("none", set())
    assert levels(text_quant="int8-dyn")["text_encoder"] == ("int8-dyn", {"w8a16-dynamic"})
    for level in ("llm-int8", "torchao-int8-dyn"):
        assert levels(text_quant=level)["text_encoder"] == (level, {level})
    with pytest.raises(UnsupportedError, match="doesn't read llm-int8; use --backend eager"):
        planned(tiny_model, quant="none", backend="openvino", text_quant="llm-int8")
    with pytest.raises(UnsupportedError, match="doesn't read nf4; use --backend eager"):
        planned(tiny_model, quant="none", backend="onnxruntime", text_quant="nf4")


def test_auto_needs_one_goal_and_only_auto_has_one(tiny_model: Path) -> None:
    for fields in ({}, {"budget": "0.2x", "min_quality": 30}):
        with pytest.raises(ValueError, match="--quant auto needs a goal"):
            planned(tiny_model, quant="auto", **fields)
    with pytest.raises(ValueError, match="need --quant auto"):
        planned(tiny_model, quant="int8", budget="0.2x")


def test_a_budget_below_the_smallest_is_refused_before_anything_is_measured(
    tiny_model: Path,
) -> None:
    with pytest.raises(SpecError, match=r"--budget 0.010x can't be met: the smallest possible is"):
        planned(tiny_model, quant="auto", budget="0.01x")
    plan = planned(tiny_model, quant="auto", budget="0.9x")
    assert plan.undecided
    assert plan.denoiser.least_bytes < plan.denoiser.predicted_bytes
    policy = Policy(rules=(Rule(pattern="*", scheme=W4A16()),))
    known = with_policy(plan, policy)
    assert not known.undecided
    assert known.denoiser.policy == policy
    assert {job.quant for job in known.jobs if job.spec.role != "denoiser"} == {"none"}


@pytest.mark.parametrize(
    ("level", "fast"),
    [("int8w", ()), ("int8-dyn", (INT8_DOT,)), ("llm-int8", (INT8_DOT,)), ("int8", (INT8_DOT,))],
)
def test_an_engine_says_that_it_is_slow_without_8_bit_products_where_it_has_some(
    tiny_model: Path, level: str, fast: tuple[tuple[str, ...], ...]
) -> None:
    job = planned(tiny_model, quant=level, backend="eager").denoiser
    needs = requires_of(job, built_on=("Linux", "x86_64"), version="2.13.0", memory_bytes=1)
    assert needs.fast_isa == fast
