"""`kiln check`: one verdict, one reason, the documented exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from profiles.facts import load_facts
from runners.bundle import read_manifest
from runners.needs import Reason
from tests.toy_bundle import toy_bundle
from tests.tracked import ROOT

Kiln = Callable[..., Any]
HOSTS = ROOT / "tests/hosts"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return toy_bundle(tmp_path / "toy")


def needing(folder: Path, **requires: Any) -> Path:
    """A toy whose engines need something else."""
    plain = read_manifest(toy_bundle(folder))
    components = tuple(
        entry.model_copy(update={"requires": entry.requires.model_copy(update=requires)})
        for entry in plain.components
    )
    return toy_bundle(folder, components=components)


def test_a_bundle_that_runs_here_says_so(kiln: Kiln, toy: Path) -> None:
    ended = kiln("check", toy)
    assert ended.code == 0
    assert ended.out == "run (meets-all): The machine has all that the engines need.\n"


def test_it_runs_slower_and_says_why(kiln: Kiln, tmp_path: Path) -> None:
    folder = needing(tmp_path / "toy", fast_isa=(("amx_int8", "avx512_vnni"),))
    ended = kiln("check", folder, "--host", HOSTS / "zen3-desktop.json")
    assert ended.code == 0
    assert ended.out.startswith(
        "run-slower (slow-isa): The engine needs amx_int8 or avx512_vnni, and AMD Ryzen 9 5950X"
    )


def test_a_rebuild_has_its_minutes_and_command_and_ends_with_10(kiln: Kiln, tmp_path: Path) -> None:
    folder = needing(tmp_path / "toy", build_isa=(("amx_bf16",),))
    ended = kiln("check", folder, "--host", HOSTS / "zen3-desktop.json", "--json")
    assert ended.code == 10
    found = json.loads(ended.out)
    assert (found["outcome"], found["reason"], found["minutes"]) == (
        "rebuild",
        "build-isa-missing",
        2,
    )
    assert found["command"] == (
        f"kiln inspect {folder} --recipe > recipe.json && "
        "kiln compile --recipe recipe.json --dtype fp32 -o rebuilt"
    )
    assert "Rebuilding takes about 2 min" in ended.sentence


def test_a_refusal_ends_with_10_and_one_sentence(kiln: Kiln, toy: Path) -> None:
    ended = kiln("check", toy, "--host", HOSTS / "alpine-container.json")
    assert ended.code == 10
    assert ended.out == "refuse (library-missing)\n"
    assert "openvino 2025.0, and none is installed: run pip install" in ended.sentence


def test_a_file_that_is_not_facts_is_wrong_input(kiln: Kiln, toy: Path) -> None:
    ended = kiln("check", toy, "--host", toy / "manifest.json")
    assert ended.code == 2
    assert "holds no facts of a machine" in ended.sentence
    assert kiln("check", toy / "unet").code == 2


def test_no_engines_library_is_imported(toy: Path) -> None:
    code = (
        "import sys\nfrom runners.cli import main\n"
        f"try: main(['check', {str(toy)!r}])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'openvino', 'onnxruntime', 'tensorrt_rtx', 'tensorrt', 'diffusers', "
        "'pynvml'}\nassert not heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_generate_asks_the_same_before_anything_is_opened(kiln: Kiln, tmp_path: Path) -> None:
    folder = needing(tmp_path / "toy", machines=("sparc",))
    ended = kiln("generate", folder, "--prompt", "x", "-o", tmp_path / "x.png")
    facts = load_facts(HOSTS / "zen3-desktop.json")
    assert facts.machine != "sparc"
    assert ended.code == 10
    assert "The engine needs sparc, and the machine is " in ended.sentence
    assert "Rebuilding takes about" in ended.sentence


def test_the_readme_lists_every_reason() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert [reason for reason in Reason if f"`{reason}`" not in text] == []
