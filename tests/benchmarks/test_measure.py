"""The order in which contestants are asked, and what an interruption leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from benchmarks.contestants import REFERENCE, Asked, Contestant
from benchmarks.measure import Measured, Request, measure
from runners.console import Console

NAMES = (REFERENCE, "int8", "int4")
REQUEST = Request(
    prompts=("a", "b"),
    prompts_source="a test",
    seeds=2,
    steps=None,
    guidance=None,
    threads=1,
    sqnr_prompts=8,
)


class Fake:
    """A worker that writes its requests into a shared list."""

    def __init__(self, name: str, log: list[tuple[str, dict[str, Any]]], stop_at: int) -> None:
        self.name, self.log, self.stop_at, self.closed = name, log, stop_at, False

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if sum(r["op"] == "image" for _, r in self.log) >= self.stop_at:
            raise KeyboardInterrupt
        self.log.append((self.name, request))
        if request["op"] == "image":
            Image.new("RGB", (8, 8)).save(request["path"])
        if request["op"] == "trajectory":
            turned = np.array([[1, 0], [1, 1 if self.name == "int8" else 0]], dtype=np.float32)
            save_file({"latents": turned}, request["path"])
        noise = [1.0, 2.0] if self.name == "int8" else [0.0, 0.0]
        answers: dict[str, dict[str, Any]] = {
            "load": {"load_seconds": 1.0, "steps": 50, "guidance": 7.5},
            "image": {"seconds": 0.5},
            "record": {"calls": 2},
            "replay": {"signal": [10.0, 20.0], "noise": noise},
            "trajectory": {"steps": 2},
            "peak": {"peak_rss_bytes": 1000},
        }
        return answers[request["op"]]

    def close(self) -> None:
        self.closed = True


class Field:
    """All fakes of one run."""

    def __init__(self, *, stop_at: int = 10_000) -> None:
        self.stop_at = stop_at
        self.log: list[tuple[str, dict[str, Any]]] = []
        self.fakes: list[Fake] = []

    def start(self, contestant: Contestant, _folder: Path, _threads: int) -> Asked:
        self.fakes.append(Fake(contestant.name, self.log, self.stop_at))
        return self.fakes[-1]

    def pictures(self) -> list[tuple[str, dict[str, Any]]]:
        """The counted ones, in the order in which they were asked for."""
        asked = [(name, r) for name, r in self.log if r["op"] == "image"]
        return asked[len(NAMES) :]


Run = Callable[..., Measured]


@pytest.fixture
def run(tmp_path: Path, entrant: Callable[..., Contestant]) -> Run:
    def go(field: Field, request: Request = REQUEST) -> Measured:
        entrants = [entrant(name, "bundle", tmp_path) for name in NAMES]
        return measure(
            entrants, request, images=tmp_path / "images", console=Console(), start=field.start
        )

    return go


def test_everybody_makes_every_picture_and_the_first_turn_rotates(run: Run) -> None:
    field = Field()
    measured = run(field)
    names = [name for name, _ in field.pictures()]
    assert names == [*NAMES, "int8", "int4", REFERENCE, "int4", REFERENCE, "int8", *NAMES]
    assert [task.prompt for task, _ in measured.rounds] == ["a", "a", "b", "b"]
    assert [task.seed for task, _ in measured.rounds] == [0, 1, 2, 3]
    assert measured.complete


def test_contestants_get_equal_requests_but_for_the_path(run: Run) -> None:
    field = Field()
    run(field)
    first = [{k: v for k, v in r.items() if k != "path"} for _, r in field.pictures()[:3]]
    assert first[0] == first[1] == first[2]
    assert (first[0]["steps"], first[0]["guidance"]) == (50, 7.5)


def test_the_users_steps_and_guidance_win_over_the_pipelines(run: Run) -> None:
    field = Field()
    measured = run(field, replace(REQUEST, steps=3, guidance=0.0))
    assert (measured.settings.steps, measured.settings.guidance) == (3, 0.0)
    assert {r["steps"] for _, r in field.pictures()} == {3}


def test_warm_up_pictures_are_short_and_not_kept(run: Run, tmp_path: Path) -> None:
    field = Field()
    measured = run(field)
    warm = [r for _, r in field.log if r["op"] == "image"][: len(NAMES)]
    assert {r["steps"] for r in warm} == {2}
    assert measured.ready_seconds == dict.fromkeys(NAMES, 1.5)
    assert not any(Path(r["path"]).is_relative_to(tmp_path) for r in warm)


def test_memory_is_asked_before_recording_could_add_to_it(run: Run) -> None:
    field = Field()
    assert run(field).peaks == dict.fromkeys(NAMES, 1000)
    order = [r["op"] for _, r in field.log]
    assert max(i for i, op in enumerate(order) if op == "peak") < order.index("record")


def test_sqnr_is_pooled_over_prompts_for_all_but_the_reference(run: Run) -> None:
    measured = run(Field())
    assert set(measured.sqnr) == {"int8", "int4"}
    assert [(s.signal, s.error) for s in measured.sqnr["int8"].steps] == [(20, 2), (40, 4)]
    assert measured.sqnr["int4"].pooled_db == 200.0


def test_an_interruption_keeps_the_rounds_that_all_finished(run: Run, tmp_path: Path) -> None:
    field = Field(stop_at=len(NAMES) + 5)
    measured = run(field)
    assert not measured.complete
    assert len(measured.rounds) == 1
    assert len(list((tmp_path / "images").rglob("*.png"))) == 5
    assert all(fake.closed for fake in field.fakes)


def test_an_interruption_before_the_first_round_is_raised_and_closes_all(run: Run) -> None:
    field = Field(stop_at=len(NAMES) + 2)
    with pytest.raises(KeyboardInterrupt):
        run(field)
    assert all(fake.closed for fake in field.fakes)


def test_pictures_of_an_earlier_run_go_and_other_files_stay(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "images" / "int8"
    folder.mkdir(parents=True)
    (folder / "0099.png").touch()
    (folder / "mine.png").touch()
    run(Field())
    assert {path.name for path in folder.iterdir()} == {
        *("0001.png", "0002.png", "0003.png", "0004.png"),
        "mine.png",
    }


def test_latents_are_compared_with_the_references_step_by_step(run: Run) -> None:
    """Those of int8 are turned by 45 degrees after the second step."""
    result = run(Field())
    assert set(result.cosines) == set(NAMES[1:])
    prompts = len(result.settings.prompts)
    assert result.cosines["int8"] == [pytest.approx([1.0, 0.5**0.5])] * prompts
    assert all(run == pytest.approx([1.0, 1.0]) for run in result.cosines[NAMES[2]])
