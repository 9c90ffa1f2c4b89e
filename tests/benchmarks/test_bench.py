"""`kiln bench`: its sections are there, and what was measured before stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.bench import _SECTIONS
from tests.conftest import Kiln


@pytest.mark.parametrize("name", _SECTIONS)
def test_a_section_is_measured_and_said_by_functions_that_exist(name: str) -> None:
    section = _SECTIONS[name]
    assert callable(section.function(section.measure))
    assert callable(section.function(section.lines))


def test_a_section_is_added_to_what_was_measured_before(kiln: Kiln, tmp_path: Path) -> None:
    other = {"capabilities": [], "rows": {}}
    (tmp_path / "bench.json").write_text(json.dumps({"tensorrt": other}))
    ended = kiln("bench", "--section", "startup", "-o", tmp_path)
    assert ended.code == 0, ended.err
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["tensorrt"] == other
    assert document["startup"]["conditions"]["versions"]
    assert "kiln --help: " in ended.out
    assert "TensorRT-RTX:" in ended.out
