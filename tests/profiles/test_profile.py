from __future__ import annotations

import pytest

from profiles import profile
from profiles.errors import SpecError, UnsupportedError
from profiles.hardware import Cpu, Hardware

TEXT = """
name = "mine"
description = "a test"
machine = "any"
requires = ["avx2"]
rank = 1
backends = ["eager"]
quant = "none"
dtype = "fp32"
[sources]
backends = "a"
quant = "b"
dtype = "c"
"""


def machine(*isa: str, kind: str = "x86_64") -> Hardware:
    return Hardware(
        os="Linux",
        machine=kind,
        cpu=Cpu(name="test", cores=2, isa=isa),
        ram_bytes=2**34,
        ram_available_bytes=2**33,
    )


CPU_PROFILES = [name for name in profile.names() if profile.load(name).rank >= 0]


@pytest.mark.parametrize("name", profile.names())
def test_every_shipped_profile_loads(name: str) -> None:
    loaded = profile.load(name)
    assert loaded.name == name
    assert loaded.backends
    assert (loaded.backends[-1] == "eager") == (name in CPU_PROFILES)


def test_a_profile_of_negative_rank_is_chosen_by_name_only() -> None:
    assert set(profile.names()) - set(CPU_PROFILES) == {"nvidia-rtx"}
    assert profile.load("generic").fits(machine(kind="riscv64"))
    assert profile.load("generic").rank >= 0


def test_ranks_are_distinct_on_each_kind_of_machine() -> None:
    ranks = [(p.machine, p.rank) for p in map(profile.load, profile.names())]
    assert len(ranks) == len(set(ranks))


ZEN4 = ("avx2", "avx512_bf16", "avx512_vnni", "avx512f")


@pytest.mark.parametrize(
    ("hardware", "expected"),
    [
        (machine(*ZEN4), "x86-avx512-vnni-bf16"),
        (machine(*ZEN4, "amx_int8", "amx_bf16", "avx_vnni"), "x86-amx"),
        (machine("avx2", "avx512_vnni", "avx512f"), "x86-avx512-vnni"),
        (machine("avx2", "avx_vnni"), "x86-avx-vnni"),
        (machine("avx2", "avx512f"), "x86-avx2"),
        (machine("sse4_2"), "generic"),
        (machine("asimddp", kind="aarch64"), "arm-dotprod"),
        (machine("asimddp", "bf16", "i8mm", kind="aarch64"), "arm-dotprod-bf16"),
        (machine(kind="riscv64"), "generic"),
    ],
)
def test_a_machine_gets_the_best_profile_that_fits(hardware: Hardware, expected: str) -> None:
    assert profile.match(hardware).name == expected


@pytest.mark.parametrize("name", CPU_PROFILES)
def test_int8_is_the_default_exactly_where_int8_dot_products_are(name: str) -> None:
    loaded = profile.load(name)
    has_dot = Cpu(name="", cores=1, isa=loaded.requires).has_int8_dot
    assert loaded.quant == ("int8" if has_dot else "none")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"'x86-avx-512'; did you mean .*x86-avx512-vnni") as error:
        profile.load("x86-avx-512")
    assert "generic" in str(error.value)
    with pytest.raises(SpecError, match=r"'zzzz'; profiles: arm-dotprod"):
        profile.load("zzzz")


def test_a_machine_that_nothing_fits_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "names", lambda: ("x86-amx",))
    with pytest.raises(UnsupportedError, match="name one with --profile: x86-amx"):
        profile.match(machine("avx2"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank = 1", "rank = 1\nspeed = 2", "speed: Extra inputs are not permitted"),
        ('"avx2"', '"avx3"', r"unknown instruction sets \['avx3'\]; known: amx_bf16"),
        ('quant = "b"\n', "", "needs a source for each of backends, dtype, quant"),
        ('dtype = "c"', 'dtype = ""', "needs a source for each of"),
        ('quant = "none"', 'quant = "int9"', "quant: Input should be 'none', 'int8' or 'int4'"),
        ('name = "mine"', 'name = "yours"', "says it is called 'yours': make them equal"),
        ("rank = 1", "rank = ", "mine is no valid TOML"),
    ],
)
def test_a_wrong_profile_is_refused_by_what_is_wrong(old: str, new: str, message: str) -> None:
    assert profile.parse(TEXT, name="mine").requires == ("avx2",)
    with pytest.raises(SpecError, match=message):
        profile.parse(TEXT.replace(old, new, 1), name="mine")
