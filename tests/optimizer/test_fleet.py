"""The fewest builds for many machines, from their facts alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest

from optimizer.cover import EXACT, smallest_cover
from optimizer.fleet_plan import FleetPlan, plan_fleet
from optimizer.recipe import Recipe
from optimizer.source import resolve
from profiles.facts import Facts, load_facts
from runners.compatibility import Outcome
from tests.tracked import ROOT

Kiln = Callable[..., Any]
MODEL = ROOT / "benchmarks/reference_model/model"
FOLDER = ROOT / "tests/hosts"


def fleet(*names: str, **wishes: Any) -> FleetPlan:
    hosts = {name: load_facts(FOLDER / f"{name}.json") for name in names}
    return plan_fleet(Recipe(model=str(MODEL), **wishes), resolve(str(MODEL)), hosts)


def test_one_cross_build_serves_all_cards_that_it_can_be_for() -> None:
    plan = fleet("rtx-3060-12gb", "rtx-4090-rtx-1-6", "rtx-5090-and-3080")
    (one,) = plan.variants
    assert one.plan.recipe.target == "sm86,sm89,sm120"
    assert all(got is one for got in plan.machines.values())
    assert len(plan.machines) == 3
    assert plan.bytes == sum(job.bundle_bytes for job in one.plan.jobs)


def test_a_cross_build_can_be_made_where_there_is_no_card() -> None:
    plan = fleet("zen4-server", "rtx-3060-12gb")
    hosts = {name: load_facts(FOLDER / f"{name}.json") for name in plan.machines}
    on_card = plan.machines["rtx-3060-12gb"]
    assert on_card.on_card
    assert on_card.anywhere
    assert "zen4-server" in on_card.builders(hosts)
    assert not plan.machines["zen4-server"].on_card


def test_what_no_one_builds_elsewhere_is_built_on_the_machine_itself() -> None:
    plan = fleet("h200-server", "zen4-server")
    hosts = {name: load_facts(FOLDER / f"{name}.json") for name in plan.machines}
    own = plan.machines["h200-server"]
    assert own.plan.recipe.backend == "tensorrt"
    assert own.builders(hosts) == ["h200-server"]


def test_machines_of_one_kind_share_the_fewest_builds() -> None:
    plan = fleet("sapphire-rapids", "zen4-server")
    assert [one.name for one in plan.variants] == ["sd1-openvino-int8-bf16"]
    mixed = fleet("sapphire-rapids", "zen4-server", "zen3-desktop")
    assert len(mixed.variants) == 1
    assert {one.verdicts[name].outcome for name, one in mixed.machines.items()} == {Outcome.RUN}


def test_equal_components_count_once() -> None:
    plan = fleet("zen4-server", "rtx-3060-12gb", "graviton3", quant="none", dtype="fp32")
    assert not any(one.on_card for one in plan.variants), "no card computes in fp32 here"
    assert plan.uncovered == {}
    sizes = [sum(size for _, size in one.parts()) for one in plan.variants]
    assert len(sizes) == 2
    assert plan.bytes == sum(sizes)  # two backends: nothing is equal
    same = FleetPlan((plan.variants[0], plan.variants[0]), {}, {}, {})
    assert same.bytes == sizes[0]


def test_a_card_that_gets_nothing_is_said_with_the_fix() -> None:
    plan = fleet("rtx-4060-laptop-old-driver")
    assert not plan.machines["rtx-4060-laptop-old-driver"].on_card
    assert (
        "NVIDIA's driver 580, and 566.36 is here" in plan.idle_cards["rtx-4060-laptop-old-driver"]
    )


def test_what_the_recipe_decides_is_kept() -> None:
    plan = fleet("zen3-desktop", "zen4-server", backend="onnxruntime", quant="int8")
    (one,) = plan.variants
    assert (one.plan.recipe.backend, one.plan.recipe.quant) == ("onnxruntime", "int8")
    assert plan.machines["zen3-desktop"].verdicts["zen3-desktop"].outcome is Outcome.RUN_SLOWER


def test_the_command_prints_what_to_run_and_ends_with_20_where_nothing_fits(kiln: Kiln) -> None:
    files = [FOLDER / f"{name}.json" for name in ("zen4-server", "rtx-3060-12gb", "core2-office")]
    ended = kiln("fleet", "plan", *files, MODEL)
    assert ended.code == 20
    assert f"kiln compile {MODEL} --backend tensorrt-rtx --quant int8" in ended.out
    assert "build on any machine, such as zen4-server" in ended.out
    assert "2 builds, " in ended.out
    assert ended.sentence.startswith("Error: 1 of 3 machines get no bundle; core2-office: The")
    assert "sse4_2" in ended.sentence


def test_json_is_one_line_with_machines_and_commands(kiln: Kiln) -> None:
    ended = kiln("fleet", "plan", FOLDER / "zen4-server.json", MODEL, "--json")
    assert ended.code == 0
    document = json.loads(ended.out)
    (variant,) = document["variants"]
    assert variant["machines"] == variant["build_on"] == ["zen4-server"]
    assert document["predicted_bytes"] == variant["predicted_bytes"] > 0
    assert document["machines"]["zen4-server"]["outcome"] == "run"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "wrong at the top"),
        ("{}", "wrong at os"),
        ('{"schema": 2}', "wrong at schema"),
        (None, "No such file"),
    ],
)
def test_a_file_that_holds_no_facts_is_named_with_what_writes_one(
    kiln: Kiln, tmp_path: Path, content: str | None, words: str
) -> None:
    path = tmp_path / "host.json"
    if content is not None:
        path.write_text(content)
    ended = kiln("fleet", "plan", path, MODEL)
    assert ended.code == 2
    assert words in ended.sentence
    assert "`kiln doctor --json > host.json`" in ended.sentence


def test_no_machines_and_machines_of_one_name_are_wrong_input(kiln: Kiln) -> None:
    assert kiln("fleet", "plan", MODEL).code == 2
    path = FOLDER / "zen4-server.json"
    ended = kiln("fleet", "plan", path, path, MODEL)
    assert ended.code == 2
    assert "Two files are called zen4-server" in ended.sentence


def every_choice(sets: list[frozenset[str]]) -> Any:
    return chain.from_iterable(combinations(range(len(sets)), n) for n in range(len(sets) + 1))


def test_the_cover_is_the_smallest_of_all_choices() -> None:
    draw = random.Random(0)
    for _ in range(100):
        sets = [frozenset(draw.sample("abcdef", draw.randint(0, 3))) for _ in range(7)]
        wanted = set().union(*sets)
        costs = [(float(draw.randint(0, 3)),) for _ in sets]
        fitting = [
            (len(chosen), sum(costs[index][0] for index in chosen))
            for chosen in every_choice(sets)
            if wanted <= set().union(*(sets[index] for index in chosen))
        ]
        found = smallest_cover(sets, wanted, costs)
        assert (len(found), sum(costs[index][0] for index in found)) == min(fitting)


def test_many_sets_are_covered_too() -> None:
    sets = [frozenset({f"{index}", f"{index + 1}"}) for index in range(EXACT + 10)]
    found = smallest_cover(sets, set().union(*sets), [(0.0,)] * len(sets))
    assert set().union(*(sets[index] for index in found)) == set().union(*sets)
    with pytest.raises(ValueError, match="don't cover"):
        smallest_cover(sets, {"nobody"}, [(0.0,)] * len(sets))


def test_facts_round_trip() -> None:
    for path in sorted(FOLDER.glob("*.json")):
        facts = load_facts(path)
        assert Facts.model_validate(facts.document()) == facts
        assert json.loads(path.read_text()) == facts.document()
