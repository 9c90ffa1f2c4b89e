"""The real child processes: same pictures, teacher forcing, peak memory, and how they fail."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contestants import REFERENCE, Contestant, Worker
from profiles.errors import BuildError, KilnError, OutOfMemory
from tests.tiny_pipelines import tiny_sd

Make = Callable[..., Contestant]
Pair = tuple[Worker, Worker, Path]

PICTURE = {"op": "image", "prompt": "a r\N{LATIN SMALL LETTER E WITH ACUTE}d fox", "seed": 3}
SETTINGS = {"steps": 3, "guidance": 4.0}


def coarser(model: Path, folder: Path) -> Path:
    """The model with its denoiser's weights rounded to bfloat16."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {name: w.to(torch.bfloat16).float() for name, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, entrant: Make) -> Iterator[Pair]:
    """The tiny pipeline and a coarser one, loaded by two workers; and a folder."""
    folder = tmp_path_factory.mktemp("workers")
    model = tiny_sd(folder / "model")
    paths = {REFERENCE: model, "coarse": coarser(model, folder / "coarse")}
    workers = []
    for name, path in paths.items():
        workers.append(Worker(entrant(name, "diffusers", path), folder=folder, threads=1))
    for worker, path in zip(workers, paths.values(), strict=True):
        worker.ask({"op": "load", "kind": "diffusers", "path": str(path), "threads": 1})
    yield workers[0], workers[1], folder
    for worker in workers:
        worker.close()


def picture(worker: Worker, path: Path, **changes: Any) -> bytes:
    answer = worker.ask({**PICTURE, **SETTINGS, **changes, "path": str(path)})
    assert answer["seconds"] > 0
    assert not path.with_name(path.name + ".part").exists()
    return path.read_bytes()


def test_the_seed_decides_the_picture_and_the_weights_change_it(pair: Pair) -> None:
    reference, coarse, folder = pair
    first = picture(reference, folder / "a" / "1.png")
    assert picture(reference, folder / "a" / "2.png") == first
    assert picture(reference, folder / "a" / "3.png", seed=4) != first
    assert picture(coarse, folder / "b" / "1.png") != first


def test_a_recorded_trajectory_replays_exactly_in_the_pipeline_that_made_it(pair: Pair) -> None:
    reference, coarse, folder = pair
    calls = str(folder / "calls")
    assert reference.ask({**PICTURE, **SETTINGS, "op": "record", "folder": calls}) == {"calls": 3}
    own = reference.ask({"op": "replay", "folder": calls})
    assert own["noise"] == [0.0, 0.0, 0.0]
    other = coarse.ask({"op": "replay", "folder": calls})
    assert other["signal"] == own["signal"]
    # bfloat16 keeps 8 bits, so the error is far below the signal and far above rounding of fp32
    for noise, total in zip(other["noise"], other["signal"], strict=True):
        assert 1e-8 < noise / total < 1e-1


def test_free_latents_start_together_and_come_apart(pair: Pair) -> None:
    from safetensors.numpy import load_file

    reference, coarse, folder = pair
    found = []
    for number, worker in enumerate((reference, reference, coarse)):
        path = folder / f"{number}.safetensors"
        answer = worker.ask({**PICTURE, **SETTINGS, "op": "trajectory", "path": str(path)})
        assert answer == {"steps": 3}
        found.append(load_file(path)["latents"])
    own, again, other = found
    assert own.shape[0] == 3
    assert (own == again).all()
    apart = [float(abs(a - b).max()) for a, b in zip(own, other, strict=True)]
    assert 0 < apart[0] < apart[2]


def test_the_pipelines_own_defaults_are_reported(pair: Pair) -> None:
    reference, _, folder = pair
    answer = reference.ask(
        {"op": "load", "kind": "diffusers", "path": str(folder / "model"), "threads": 1}
    )
    assert (answer["steps"], answer["guidance"]) == (50, 7.5)


def test_peak_memory_is_the_childs_own(tmp_path: Path, entrant: Make) -> None:
    """A child's `ru_maxrss` would start at its parent's on Linux."""
    ballast = bytearray(b"x") * 400_000_000
    worker = Worker(entrant("int8", "bundle", tmp_path), folder=tmp_path, threads=1)
    peak = worker.ask({"op": "peak"})["peak_rss_bytes"]
    worker.close()
    assert 5e6 < peak < 300e6 < len(ballast)


def test_a_failure_names_the_contestant_and_keeps_the_traceback(pair: Pair) -> None:
    reference, _, folder = pair
    with pytest.raises(BuildError, match=r"diffusers fp32 failed .*FileNotFoundError") as caught:
        reference.ask({"op": "load", "kind": "diffusers", "path": str(folder / "no"), "threads": 1})
    assert "Traceback" in caught.value.log


def test_a_killed_child_is_reported_as_out_of_memory(tmp_path: Path, entrant: Make) -> None:
    worker = Worker(entrant("int8", "bundle", tmp_path), folder=tmp_path, threads=1)
    process = worker._process
    process.kill()
    process.wait()
    expected: type[KilnError] = OutOfMemory if os.name == "posix" else BuildError
    with pytest.raises(expected, match="int8"):
        worker.ask({"op": "peak"})
    worker.close()


def test_a_child_ends_when_its_parent_is_gone_and_ignores_ctrl_c(
    tmp_path: Path, entrant: Make
) -> None:
    worker = Worker(entrant("int8", "bundle", tmp_path), folder=tmp_path, threads=1)
    assert worker.ask({"op": "peak"})["peak_rss_bytes"] > 0
    process = worker._process
    if os.name == "posix":
        process.send_signal(signal.SIGINT)
        assert worker.ask({"op": "peak"})["peak_rss_bytes"] > 0
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait() == 0
    worker.close()


def test_requests_and_answers_are_json_lines(pair: Pair) -> None:
    _, coarse, _ = pair
    with pytest.raises(BuildError, match="KeyError"):
        coarse.ask({"op": "dance"})
    assert json.dumps(coarse.ask({"op": "peak"}))
