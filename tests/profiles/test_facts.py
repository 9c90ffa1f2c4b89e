"""The facts of a machine: read one by one, named where they can't be, the same when read again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from profiles import disk, driver, facts
from profiles.driver import Card, Driver, parse_smi, read_driver
from profiles.facts import Facts, load_facts, read_facts, tier_of
from profiles.libraries import LIBRARIES, version_of
from runners.doctor import advice
from tests.tracked import ROOT

Kiln = Callable[..., Any]
GIB = 1 << 30
SMI = (
    "NVIDIA GeForce RTX 3060, 8.6, 12288, 11000, 581.29\nNVIDIA GB10, 12.1, [N/A], [N/A], 581.29\n"
)
BANNER = "| NVIDIA-SMI 581.29   Driver Version: 581.29   CUDA Version: 13.0 |"


def host(name: str) -> Facts:
    return load_facts(ROOT / "tests/hosts" / f"{name}.json")


def test_this_machines_facts_are_read_without_any_engines_library() -> None:
    code = (
        "import sys; from profiles.facts import read_facts; read_facts(); "
        "heavy = {'torch', 'openvino', 'onnxruntime', 'tensorrt_rtx', 'tensorrt', 'diffusers'}; "
        "assert not heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    found = read_facts()
    assert found.libraries["openvino"] == next(
        one.version for one in found.backends if one.name == "openvino"
    )
    assert Facts.model_validate(found.document()) == found
    assert found.document()["schema"] == 1


def test_without_asking_the_driver_there_are_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "read_driver", lambda: 1 / 0)
    assert read_facts(ask_driver=False).cards == ()


def test_facts_that_cannot_be_read_are_named_and_the_others_are_there(
    monkeypatch: pytest.MonkeyPatch, kiln: Kiln
) -> None:
    def broken() -> Any:
        raise OSError("no luck\nat all")

    for name in ("read_memory", "read_cpu", "read_driver", "read_glibc"):
        monkeypatch.setattr(facts, name, broken)
    monkeypatch.setattr(facts, "read_disk", lambda _where: broken())
    found = read_facts()
    assert found.unread == (
        "NVIDIA driver: no luck",
        "memory: no luck",
        "processor: no luck",
        "glibc: no luck",
        "disk: no luck",
    )
    assert (found.ram_bytes, found.disk, found.cards) == (0, None, ())
    assert "torch" in found.libraries
    ended = kiln("doctor")
    assert ended.code == 0
    assert "not read   memory: no luck" in ended.out


def test_doctor_prints_what_json_holds(kiln: Kiln, tmp_path: Path) -> None:
    ended = kiln("doctor", "--json")
    assert ended.code == 0
    path = tmp_path / "here.json"
    path.write_text(ended.out)
    found = load_facts(path)
    text = kiln("doctor").out
    assert found.cpu.name in text
    assert f"profile    {found.profile}" in text
    assert "advice" in text
    for one in found.backends:
        assert f"backend    {one.name}" in text


def test_what_nvidia_smi_prints_is_understood() -> None:
    found = parse_smi(SMI, BANNER)
    assert found == Driver(
        version="581.29",
        cuda="13.0",
        cards=(
            Card(
                name="NVIDIA GeForce RTX 3060",
                capability="8.6",
                memory_bytes=12 * GIB,
                memory_free_bytes=11000 << 20,
            ),
            Card(name="NVIDIA GB10", capability="12.1", memory_bytes=None, memory_free_bytes=None),
        ),
    )
    assert parse_smi("", BANNER) is None
    older = parse_smi(SMI, "no table")
    assert older is not None
    assert older.cuda is None
    with pytest.raises(OSError, match="nvidia-smi printed"):
        parse_smi("Failed to initialize NVML: Driver/library version mismatch", BANNER)


def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = tmp_path / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setattr(driver, "find_spec", lambda _name: None)
    monkeypatch.setattr(driver.shutil, "which", lambda _name: str(path))


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
def test_nvidia_smi_is_asked_where_the_library_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, monkeypatch, f"[ -n \"$1\" ] && printf '{SMI!s}' || echo '{BANNER}'")
    assert read_driver() == parse_smi(SMI, BANNER)
    program(tmp_path, monkeypatch, "echo 'No devices were found'; exit 6")
    assert read_facts().unread == ("NVIDIA driver: nvidia-smi says: No devices were found",)


def nvml(**changed: Any) -> Any:
    """nvidia-ml-py's functions for one card."""

    class NVMLError(Exception):
        pass

    functions = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda _handle: "NVIDIA H200",
        "nvmlDeviceGetCudaComputeCapability": lambda _handle: (9, 0),
        "nvmlDeviceGetMemoryInfo": lambda _handle: SimpleNamespace(total=141 * GIB, free=GIB),
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 12080,
        "nvmlSystemGetDriverVersion": lambda: "570.86.10",
    }
    return SimpleNamespace(**{**functions, **changed})


def test_the_drivers_own_library_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "find_spec", lambda _name: True)
    monkeypatch.setattr(driver, "import_module", lambda _name: nvml())
    found = read_driver()
    assert found is not None
    assert (found.version, found.cuda) == ("570.86.10", "12.8")
    assert found.cards[0].capability == "9.0"
    assert tier_of(found.cards) == "larger"


def test_a_library_without_a_driver_means_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nvml()

    def fail() -> None:
        raise module.NVMLError("NVML Shared Library Not Found")

    module.nvmlInit = fail
    monkeypatch.setattr(driver, "find_spec", lambda _name: True)
    monkeypatch.setattr(driver, "import_module", lambda _name: module)
    monkeypatch.setattr(driver.shutil, "which", lambda _name: None)
    assert read_driver() is None


@pytest.mark.parametrize(
    ("gib", "tier"),
    [
        (6, "below entry"),
        (7.6, "entry"),
        (8, "entry"),
        (12, "mid-range"),
        (15.9, "performance"),
        (31.8, "professional"),
    ],
)
def test_a_tier_is_that_of_the_largest_card(gib: float, tier: str) -> None:
    small = Card(name="", capability="8.6", memory_bytes=GIB, memory_free_bytes=0)
    card = small.model_copy(update={"memory_bytes": int(gib * GIB)})
    assert tier_of((small, card)) == tier
    assert tier_of(()) == "processor"


def test_a_library_under_another_name_counts() -> None:
    assert version_of("onnxruntime", {"onnxruntime-gpu": "1.30.0"}) == "1.30.0"
    assert version_of("onnxruntime", {"onnxruntime-gpu": "2", "onnxruntime": "1"}) == "1"
    assert version_of("openvino", {}) is None
    assert version_of("unheard-of", {"unheard-of": "1"}) == "1"


def test_every_backend_that_is_built_for_has_a_library() -> None:
    from optimizer.backends import BACKENDS

    assert {name: one.library for name, one in BACKENDS.items()} == {
        name: library.distributions[0] for name, library in LIBRARIES.items()
    }


def test_what_is_not_usable_names_what_installs_it() -> None:
    found = {one.name: one for one in host("laptop-arm-windows").backends}
    assert found["openvino"].fix == 'pip install "kiln-diffusion[cpu]"'
    assert not found["openvino"].usable
    assert "needs an NVIDIA card" in str(found["tensorrt-rtx"].fix)


def test_the_guides_requirements_pass_or_are_advice() -> None:
    good = {what: passes for what, passes, _ in advice(host("rtx-5090-and-3080"))}
    assert all(good.values())
    poor = {what: passes for what, passes, _ in advice(host("laptop-8gb"))}
    assert not any(poor.values())
    assert good.keys() == poor.keys()


def block(root: Path, name: str, *slaves: str) -> Path:
    folder = root / name
    (folder / "slaves").mkdir(parents=True)
    for slave in slaves:
        (folder / "slaves" / slave).symlink_to(root / slave)
    return folder


def test_a_volume_is_nvme_if_all_it_lies_on_is(tmp_path: Path) -> None:
    for name in ("nvme0n1p2", "nvme1n1", "sda1", "vda"):
        block(tmp_path, name)
    for name, slaves, expected in (
        ("dm-0", ("nvme0n1p2", "nvme1n1"), True),
        ("dm-1", ("nvme0n1p2", "sda1"), False),
        ("dm-2", ("nvme0n1p2", "vda"), None),
    ):
        assert disk.is_nvme(block(tmp_path, name, *slaves)) is expected
    assert disk.is_nvme(tmp_path / "nvme0n1p2") is True
    assert disk.is_nvme(tmp_path / "sda1") is False
    assert disk.is_nvme(tmp_path / "absent") is None


def test_facts_are_one_json_line(kiln: Kiln) -> None:
    (line,) = kiln("doctor", "--json").out.splitlines()
    assert json.loads(line)["schema"] == 1
