"""Plans for models that nobody has compiled, on 30 recorded machines: golden, for a review."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimizer.compile import plan_recipe
from optimizer.families import FAMILIES
from optimizer.outlook import model_outlook, predicted_base, predicted_part
from optimizer.recipe import checked
from profiles.errors import OutOfMemory, SpecError
from profiles.facts import Facts, load_facts
from profiles.tiers import tier_for
from runners import outlook as outlooks
from runners.memory import choose, gib, rows
from tests.tracked import ROOT

Kiln = Callable[..., Any]
ASSETS = ROOT / "optimizer/families/assets"
HOSTS = {
    path.stem: load_facts(path)
    for folder in ("tests/hosts", "tests/memory_hosts")
    for path in sorted((ROOT / folder).glob("*.json"))
}
GOLDEN = Path(__file__).with_name("plans.json")
"""Host -> family -> the pick at the tier's side; `KILN_WRITE_GOLDEN=1` writes it anew, for a
review."""


def plan(facts: Facts, family: str) -> str:
    outlook = model_outlook(family, facts)
    tier = tier_for(facts)
    side = outlook.side.nearest(tier.side if tier else 512)
    try:
        budget = outlooks.budget_of(facts, outlook.device, None)
    except SpecError:
        return "free memory unread"
    said = f"{side} px in {gib(budget.bytes)}: "
    try:
        row = choose(rows(outlook.parts, outlook.asked(side, side, 1)), budget.bytes)
    except OutOfMemory as error:
        least = str(error).partition("the smallest ")[2].partition(". Free")[0]
        return f"{said}nothing fits: {least}"
    return said + f"{row.way.describe()}, {gib(row.peak_bytes)}"


def test_120_plans_are_as_they_were_reviewed() -> None:
    found = {
        name: {family: plan(facts, family) for family in FAMILIES} for name, facts in HOSTS.items()
    }
    assert sum(map(len, found.values())) == 120
    if os.environ.get("KILN_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(GOLDEN.read_text())


def test_of_two_cards_the_one_with_more_free_memory_counts() -> None:
    facts = HOSTS["rtx-4080-half-full-and-3060"]
    budget = outlooks.budget_of(facts, "card", None)
    assert "3060" in budget.what
    assert budget.bytes == facts.cards[1].memory_free_bytes


def test_a_card_half_full_gets_a_smaller_plan() -> None:
    whole, half = (
        outlooks.budget_of(HOSTS[name], "card", None).bytes
        for name in ("rtx-3070-8gb", "rtx-3070-8gb-half-full")
    )
    outlook = model_outlook("sdxl", HOSTS["rtx-3070-8gb"])
    found = rows(outlook.parts, outlook.asked(768, 768, 1))
    assert choose(found, whole).peak_bytes > half


def test_a_model_is_planned_without_torch_and_without_weights() -> None:
    code = (
        "import sys; from optimizer.outlook import model_outlook; "
        "from profiles.facts import load_facts; from pathlib import Path; "
        "facts = load_facts(Path('tests/hosts/rtx-3060-12gb.json')); "
        f"[model_outlook(name, facts) for name in {list(FAMILIES)!r}]; "
        "heavy = {'torch', 'openvino', 'onnxruntime', 'diffusers', 'transformers'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_more_pixels_and_more_pictures_take_more() -> None:
    for family in FAMILIES:
        outlook = model_outlook(family, HOSTS["zen4-server"])
        peaks = [
            rows(outlook.parts, outlook.asked(side, side, batch))[0].peak_bytes
            for side, batch in ((512, 1), (1024, 1), (1024, 2))
        ]
        assert peaks == sorted(peaks)
        assert len(set(peaks)) == 3


def test_the_command_prints_rows_and_a_pick(kiln: Kiln) -> None:
    ended = kiln("plan", "sdxl", "--memory", "8GiB", "--size", "1024x1024", "--json")
    assert ended.code == 0
    said = json.loads(ended.out)
    assert said["memory_bytes"] == 8 << 30
    assert said["predicted_peak_bytes"] == said["pick"]["peak_bytes"] <= 8 << 30
    assert said["pick"] in said["rows"]
    assert {row["residency"] for row in said["rows"]} == {"keep", "sequential"}
    assert set(said["pick"]["stages"]) == {"text_encoding", "denoising", "decoding"}
    assert all(row["build_bytes"] > said["base_bytes"] for row in said["rows"])
    text = kiln("plan", "sdxl", "--memory", "8GiB").out
    assert "fits best" in text
    assert "tier memory-8: 512 px" in text


def test_a_tier_out_of_reach_says_what_stands_in_the_way(kiln: Kiln) -> None:
    host = str(ROOT / "tests/memory_hosts/rtx-3070-8gb.json")
    said = json.loads(kiln("plan", "flux", "--host", host, "--memory", "48GiB", "--json").out)
    assert said["tier"]["reached"]
    outlook = model_outlook("flux", HOSTS["rtx-3070-8gb"])
    budget = outlooks.budget_of(HOSTS["rtx-3070-8gb"], "card", None)
    verdict = outlooks.tier_verdict(outlook, budget)
    assert verdict is not None
    assert not verdict["reached"]
    assert "of weights" in verdict["why"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("sd1", "--memory", "1MiB"), 13, "the smallest"),
        (("sd1", "--memory", "much"), 2, "write it as 8GiB"),
        (("sd1", "--memory", "0"), 2, "write it as 8GiB"),
        (("sd1", "--memory", "8GiB", "--size", "500x500"), 2, "use 504x504"),
        (("sd1", "--memory", "8GiB", "--batch", "0"), 2, "use 1 or more"),
        (("sd1", "--memory", "8GiB", "--variant", "int3"), 2, "has none, int8, int4"),
        (("sd1", "--memory", "8GiB", "--tiled"), 2, "larger than a tile"),
        (("sd1", "--backend", "cuda"), 2, "use one of openvino"),
        (("nothing-here", "--memory", "8GiB"), 2, "a family's name"),
        (("sd1", "--host", "pyproject.toml"), 2, "kiln doctor --json"),
    ],
)
def test_wrong_requests_are_one_sentence(
    arguments: tuple[str, ...], code: int, words: str, kiln: Kiln
) -> None:
    ended = kiln("plan", *arguments)
    assert ended.code == code
    assert words in ended.sentence


def test_unread_facts_are_named_and_planning_goes_on(kiln: Kiln, tmp_path: Path) -> None:
    host = ROOT / "tests/memory_hosts/workstation-128gb-unread.json"
    ended = kiln("plan", "sd1", "--host", str(host))
    assert ended.code == 0
    assert "doesn't tell everything: NVIDIA driver" in ended.err
    document = {**json.loads(host.read_text()), "ram_available_bytes": 0, "unread": ["memory: x"]}
    (tmp_path / "host.json").write_text(json.dumps(document))
    ended = kiln("plan", "sd1", "--host", str(tmp_path / "host.json"))
    assert ended.code == 2
    assert "--memory 8GiB" in ended.sentence
    assert kiln("plan", "sd1", "--host", str(tmp_path / "host.json"), "--memory", "8GiB").code == 0


def test_broken_configs_are_one_sentence(kiln: Kiln, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "sd1", folder)
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "down_block_types": 3}))
    assert "can't be understood" in kiln("plan", str(folder), "--memory", "8GiB").sentence
    shutil.rmtree(folder / "unet")
    assert "no unet/config.json" in kiln("plan", str(folder), "--memory", "8GiB").sentence
    shutil.rmtree(folder / "vae")
    assert "no vae/config.json" in kiln("plan", str(folder), "--memory", "8GiB").sentence


def test_engines_for_cards_that_are_not_here_carry_the_formulas(tiny_model: Path) -> None:
    recipe = checked({"model": str(tiny_model), "target": "sm86"})
    plan, _ = plan_recipe(recipe)
    part = predicted_part(plan, plan.denoiser, 5_000_000)
    assert part.source == "formula"
    assert part.resident_bytes == 5_000_000
    live = plan.family.outlines(
        {name: plan.source.component_config(name) for name in ("text_encoder", "unet", "vae")}
    )["unet"].live["pixels"]
    assert part.stays["pixels"] == 2 * live  # fp16
    assert predicted_base(plan.denoiser).base_bytes > 0
