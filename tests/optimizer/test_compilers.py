"""Backends that compile C++ say which package is missing, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimizer import compilers
from optimizer.compilers import require_compiler
from optimizer.requiring import native_of
from profiles.errors import MissingError
from runners.needs import Outcome, Reason, _build_isa
from tests.toy_bundle import OBSERVED, REQUIRES


def test_a_compiler_that_is_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers.shutil, "which", lambda name: f"/bin/{name}")
    require_compiler("aoti")


def test_the_one_that_the_environment_names_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "my-own-compiler")
    with pytest.raises(MissingError, match="my-own-compiler isn't there"):
        require_compiler("aoti")


@pytest.mark.parametrize("backend", ["aoti", "aoti-blocks"])
def test_compiling_without_one_names_the_package(
    kiln: Callable[..., Any],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compilers.sys, "platform", "linux")
    monkeypatch.setattr(compilers.shutil, "which", lambda _name: None)
    options = ("--backend", backend, "--quant", "none", "-o", tmp_path / "out")
    ended = kiln("compile", tiny_model, *options)
    assert ended.code == 17
    assert f"The backend {backend} compiles C++, and g++ isn't there: install g++" in ended.sentence
    assert not (tmp_path / "out").exists()


def test_instruction_sets_that_a_machine_lacks_need_another_build_there() -> None:
    """Another dtype, which helps where bf16 is missing, would not."""
    native = native_of({"isa": "avx512bw,avx512f", "glibc": "2.34"})
    assert (native.isa, native.glibc) == (("avx512bw", "avx512f"), "2.34")
    need = REQUIRES.model_copy(update={"build_isa": tuple((name,) for name in native.isa)})
    facts: Any = OBSERVED.host.model_copy()
    found = _build_isa(need, facts)
    assert found is not None
    assert (found.outcome, found.reason) == (Outcome.REBUILD, Reason.BUILD_ISA_MISSING)
    assert found.needed == "avx512bw and avx512f"
    assert found.fix == "compile it again there"
