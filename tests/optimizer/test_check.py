from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from optimizer.calls import Call, load_calls, save_calls
from optimizer.check import build_and_check
from optimizer.compile import plan_recipe
from optimizer.job import Job
from optimizer.recipe import Recipe
from profiles.errors import BuildError, ParityError

Stages = tuple[Job, Path, Path]


@pytest.fixture
def stages(bundle: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> Stages:
    """What build_and_check gets for the text encoder, made of the bundle that came of it."""
    import json
    import shutil

    from runners.bundle import open_bundle
    from runners.pipeline import open_engine

    out = bundle("onnxruntime")
    entry = open_bundle(out).manifest.component("text_encoder")
    plan, _ = plan_recipe(
        Recipe(model=str(tiny_model), backend="onnxruntime", dtype="fp32", quant="none")
    )
    job = next(job for job in plan.jobs if job.spec.name == "text_encoder")
    prepared, recorded = tmp_path / "prepared", tmp_path / "recorded"
    prepared.mkdir()
    recorded.mkdir()
    for name in entry.files.values():
        shutil.copyfile(out / name, prepared / Path(name).name)
    info = {
        "layers_quantized": 0,
        "layers_total": 12,
        "sqnr_db": 200.0,
        "unseen_sqnr_db": {"1": 200.0},
        "smallest_sqnr_db": 200.0,
    }
    (prepared / "info.json").write_text(json.dumps(info))
    ids = np.arange(32).reshape(1, 32)
    with open_engine(open_bundle(out), entry, threads=1) as engine:
        outputs = tuple(engine({"input_ids": ids}).values())
    save_calls({"1": Call((ids,), outputs)}, prepared / "unseen.safetensors")
    save_calls({"smallest": Call((ids,), outputs)}, prepared / "smallest.safetensors")
    save_calls({"0000": Call((ids,), outputs)}, recorded / "text_encoder.safetensors")
    return job, prepared, recorded


def test_an_engine_that_is_right_is_kept(stages: Stages, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    out.mkdir()
    seen: list[tuple[float, float]] = []
    build_and_check(*stages, out, lambda done, total: seen.append((done, total)))
    assert (out / "built.json").is_file()
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_an_engine_that_runs_fewer_low_bit_kernels_than_planned_is_refused(
    stages: Stages, tmp_path: Path
) -> None:
    """This one has none at all, being fp32."""
    job, *folders = stages
    job = dataclasses.replace(job, low_bit_kernels=2)
    out = tmp_path / "engine"
    out.mkdir()
    with pytest.raises(BuildError) as caught:
        build_and_check(job, *folders, out, lambda _done, _total: None)
    assert "2 layers of text_encoder should run in low bits" in str(caught.value)
    assert "only 0 do" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "where"),
    [("prepared/unseen.safetensors", "1"), ("recorded/text_encoder.safetensors", "the recorded")],
)
@pytest.mark.parametrize("spoiled", ["shifted", "nan"])
def test_an_engine_whose_numbers_differ_is_refused(
    stages: Stages, tmp_path: Path, file: str, where: str, spoiled: str
) -> None:
    """A thousandth of the signal is 60 dB, and fp32 must reach 79; -200 dB is what NaN counts."""
    path = tmp_path / file
    [(name, call)] = load_calls(path).items()
    hidden, *others = call.outputs
    wrong = hidden * np.float32(1.001) if spoiled == "shifted" else hidden + np.float32("nan")
    save_calls({name: dataclasses.replace(call, outputs=(wrong, *others))}, path)
    out = tmp_path / "engine"
    out.mkdir()
    with pytest.raises(ParityError) as caught:
        build_and_check(*stages, out, lambda done, total: None)  # noqa: ARG005
    sentence = str(caught.value)
    reached = "60.0" if spoiled == "shifted" else "-200.0"
    assert (
        f"The onnxruntime engine of text_encoder reaches {reached} dB SQNR on {where}" in sentence
    )
    assert "79.0 dB are needed" in sentence
    assert "compile with --dtype fp32 or another --backend" in sentence
    assert not (out / "built.json").exists()
