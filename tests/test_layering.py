from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions

import pytest

from tests.tracked import PACKAGES, ROOT, modules


def imports_of(source: str) -> Iterator[str]:
    """Every module that a source names in an import statement, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who imports whom"
            assert node.module is not None
            yield node.module


def forbidden_imports(package: str, source: str) -> list[str]:
    above = PACKAGES[: PACKAGES.index(package)]
    return [name for name in imports_of(source) if name.partition(".")[0] in above]


def test_the_rule_sees_what_it_should() -> None:
    source = "def f():\n    from optimizer.store import Store\n"
    assert forbidden_imports("runners", source) == ["optimizer.store"]
    assert forbidden_imports("optimizer", source) == []
    assert forbidden_imports("profiles", "import runners.cli, benchmarks") == [
        "runners.cli",
        "benchmarks",
    ]


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_downwards(module: str) -> None:
    package = module.partition("/")[0]
    source = (ROOT / module).read_text(encoding="utf-8")
    assert forbidden_imports(package, source) == []
    assert "tests" not in {name.partition(".")[0] for name in imports_of(source)}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
UNTESTED = {"lpips", "nvidia-ml-py", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx"}
"""Need an NVIDIA machine or torchvision, or carry their exact version in pyproject.toml."""


def requirement_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return match[0].lower().replace("_", "-")


def direct_dependencies() -> set[str]:
    extras = PROJECT["optional-dependencies"].values()
    every = [*PROJECT["dependencies"], *(entry for extra in extras for entry in extra)]
    return {requirement_name(entry) for entry in every} - {PROJECT["name"]}


def test_every_direct_dependency_has_its_tested_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9.]*", pin) for pin in pins)
    assert pins == sorted(pins, key=requirement_name)
    assert {requirement_name(pin) for pin in pins} == direct_dependencies() - UNTESTED


def test_every_imported_distribution_is_a_direct_dependency() -> None:
    known = {*PACKAGES, *sys.stdlib_module_names}
    sources = ((ROOT / module).read_text(encoding="utf-8") for module in modules())
    imported = {name.partition(".")[0] for source in sources for name in imports_of(source)}
    owners = packages_distributions()
    undeclared = {
        name
        for name in imported - known
        if direct_dependencies().isdisjoint(map(requirement_name, owners.get(name, [name])))
    }
    assert undeclared == set()
