from __future__ import annotations

import platform
from pathlib import Path

import psutil
import pytest

from profiles import hardware
from profiles.hardware import ISA, Cpu, Hardware, detect, free_disk_bytes, parse_cpuinfo

ZEN4 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 9R14
flags\t\t: fpu avx2 avx512f avx512_bf16 avx512_vnni clzero

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
GRAVITON = """\
processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd asimddp i8mm bf16
CPU part\t: 0xd40
"""


def cpu(*isa: str) -> Cpu:
    return Cpu(name="test", cores=1, isa=isa)


def test_this_machine_is_described() -> None:
    found = detect()
    assert found.os == platform.system()
    assert 1 <= found.cpu.cores <= (psutil.cpu_count() or 1)
    assert found.cpu.name
    assert set(found.cpu.isa) <= set(ISA)
    assert 0 < found.ram_available_bytes <= found.ram_bytes <= psutil.virtual_memory().total
    assert Hardware.model_validate_json(found.model_dump_json()) == found


def test_cpuinfo_of_x86_gives_the_first_processor() -> None:
    name, flags = parse_cpuinfo(ZEN4)
    assert name == "AMD EPYC 9R14"
    assert {"avx512_bf16", "avx512_vnni"} <= flags
    assert "processor" not in flags


def test_cpuinfo_of_arm_has_features_and_no_name() -> None:
    name, flags = parse_cpuinfo(GRAVITON)
    assert name == ""
    assert {"asimddp", "i8mm", "bf16"} <= flags


def test_the_processor_itself_agrees_with_the_kernel() -> None:
    """The way of Windows and macOS, through archspec, finds no more than the kernel lists."""
    name, flags = hardware._ask_archspec()
    assert isinstance(name, str)
    assert set(flags) & set(ISA) <= {*detect().cpu.isa, "avx512f", "avx2", "avx"}


@pytest.mark.parametrize("isa", ["amx_int8", "avx512_vnni", "avx_vnni", "asimddp", "i8mm"])
def test_int8_dot_products_are_known_by_any_of_their_names(isa: str) -> None:
    assert cpu("avx2", isa).has_int8_dot
    assert not cpu("avx2", "avx512f").has_int8_dot


@pytest.mark.parametrize("isa", ["amx_bf16", "avx512_bf16", "bf16"])
def test_bf16_is_known_by_any_of_its_names(isa: str) -> None:
    assert cpu("avx2", isa).has_bf16
    assert not cpu("avx2", "avx512_vnni").has_bf16


def test_a_containers_memory_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1073741824\n")
    (tmp_path / "memory.current").write_text("4096\n")
    assert hardware._container_memory(tmp_path) == (2**30, 4096)
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware._container_memory(tmp_path) == (None, 0)
    assert hardware._container_memory(tmp_path / "absent") == (None, 0)


def test_free_disk_of_a_folder_that_is_not_made_yet(tmp_path: Path) -> None:
    assert free_disk_bytes(tmp_path / "a" / "b") > 0
