from __future__ import annotations

import re

import pytest

from profiles import gpu, profile
from profiles.errors import SpecError
from profiles.gpu import Gpu

TEXT = """
name = "mine"
description = "a test"
cards = ["NVIDIA Mine"]
capability = "8.9"
memory_gib = 24
bandwidth_gb_s = 1008.5
[peak]
fp32 = 10.0
fp16 = 20
int8 = 80.0
[sources]
capability = "a"
memory_gib = "b"
bandwidth_gb_s = "c"
peak = "d"
"""
CARDS = [gpu.load(name) for name in gpu.names()]
BY_NAME = pytest.mark.parametrize("card", CARDS, ids=gpu.names())
GIB = 2**30


def card_of(capability: str, **peak: float) -> Gpu:
    fields = gpu.parse(TEXT, name="mine").model_dump()
    return Gpu.model_validate({**fields, "capability": capability, "peak": {"fp16": 1.0, **peak}})


@BY_NAME
def test_every_shipped_card_says_its_name_and_what_the_driver_calls_it(card: Gpu) -> None:
    assert Gpu.model_validate_json(card.model_dump_json()) == card
    assert all(name.startswith("NVIDIA ") for name in card.cards)
    assert f"compute capability {card.capability}." in card.sources["capability"]


def test_no_card_is_called_like_a_profile() -> None:
    assert set(gpu.names()).isdisjoint(profile.names())


RATIOS = {
    ("GeForce", "8.6"): {"fp16": 2, "bf16": 2, "int8": 8},
    ("GeForce", "8.9"): {"fp16": 2, "bf16": 2, "int8": 8, "fp8": 4},
    ("GeForce", "12.0"): {"fp16": 2, "bf16": 2, "int8": 8, "fp8": 4, "fp4": 16},
    ("RTX", "8.6"): {"fp16": 4, "bf16": 4, "int8": 8},
    ("RTX", "8.9"): {"fp16": 4, "bf16": 4, "int8": 8, "fp8": 8},
    ("RTX", "12.0"): {"fp16": 4, "bf16": 4, "int8": 8, "fp8": 8, "fp4": 16},
    ("centre", "8.0"): {"fp16": 16, "bf16": 16, "int8": 32},
    ("centre", "8.9"): {"fp16": 4, "bf16": 4, "int8": 8, "fp8": 8},
    ("centre", "9.0"): {"fp16": 14.8, "bf16": 14.8, "int8": 29.6, "fp8": 29.6},
}
"""Peaks over fp32's: operations per multiprocessor and clock, the same in a whole generation.

From the whitepapers that the files name; on GeForce, sums in fp32 halve the rate of fp16, bf16 and
fp8. Hopper's tensor cores are stated at 1830 MHz and its fp32 at 1980: 16 and 32 times 0.924.
"""


@BY_NAME
def test_peaks_have_the_ratios_of_their_generation(card: Gpu) -> None:
    kinds = (kind for kind in ("GeForce", "RTX") if kind in card.cards[0])
    expected = RATIOS[next(kinds, "centre"), card.capability]
    peaks = dict(card.peak)
    fp32 = peaks.pop("fp32")
    assert {kind: value / fp32 for kind, value in peaks.items()} == pytest.approx(
        expected, rel=0.02
    )


@BY_NAME
def test_low_bit_peaks_and_formats_agree(card: Gpu) -> None:
    assert ("fp8" in card.peak) == ("fp8" in card.formats)
    assert ("fp4" in card.peak) == ("nvfp4" in card.formats)
    assert "bf16" in card.peak


@BY_NAME
def test_int8_does_twice_what_fp16_does_everywhere(card: Gpu) -> None:
    """The source of the profile nvidia-rtx; the 1 % is rounding."""
    assert card.peak["int8"] >= 2 * 0.99 * card.peak["fp16"]
    assert "int8" in card.fast


STATED = {
    "bandwidth": r"(?P<bits>\d+)-bit \S+ at (?P<gbit>[\d.]+) Gbit/s / 8 = (?P<gb>[\d.]+) GB/s",
    "fp32": r"^Derived: (?P<sms>\d+) SMs .*? x (?P<mhz>\d+) MHz boost",
    "tops": r"NVIDIA states (?P<tops>\d+) AI TOPS",
}
"""The arithmetic that the sources of the cards state, to be done again."""


def stated(key: str, what: str) -> list[tuple[Gpu, re.Match[str]]]:
    found = ((card, re.search(STATED[what], card.sources[key])) for card in CARDS)
    return [(card, match) for card, match in found if match]


def test_bandwidth_is_bus_width_times_data_rate() -> None:
    cards = stated("bandwidth_gb_s", "bandwidth")
    assert {card.name for card, _ in cards} >= {n for n in gpu.names() if n.startswith("rtx-")}
    for card, match in cards:
        product = int(match["bits"]) * float(match["gbit"]) / 8
        assert card.bandwidth_gb_s == float(match["gb"]) == pytest.approx(product), card.name


def test_derived_fp32_is_multiprocessors_times_clock() -> None:
    """256 operations per multiprocessor and clock since Ampere's GA102: 128 fused multiply-adds."""
    cards = stated("peak", "fp32")
    assert len(cards) >= 20
    for card, match in cards:
        product = int(match["sms"]) * int(match["mhz"]) * 256 / 1e6
        assert card.peak["fp32"] == pytest.approx(product, rel=0.01), card.name


def test_ai_tops_are_twice_the_fastest_dense_peak() -> None:
    """Twice because of sparsity; of fp4 on Blackwell and of int8 on Ada."""
    cards = stated("peak", "tops")
    assert len(cards) >= 12
    for card, match in cards:
        assert int(match["tops"]) == pytest.approx(2 * max(card.peak.values()), rel=0.02), card.name


@pytest.mark.parametrize(
    ("device", "mib", "expected"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 8188, "rtx-4060-ti-8gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 3080", 10240, "rtx-3080-10gb"),
        ("NVIDIA GeForce RTX 3080", 12288, "rtx-3080-12gb"),
        ("NVIDIA L4", 23034, "l4"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100-sxm"),
        ("NVIDIA GeForce RTX 3060", 8192, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, None),
        ("nvidia geforce rtx 4090", 24564, None),
        ("NVIDIA TITAN V", 12288, None),
    ],
)
def test_a_live_card_is_known_by_its_exact_name_and_its_memory(
    device: str, mib: int, expected: str | None
) -> None:
    found = gpu.of_card(device, mib * 2**20)
    assert (found and found.name) == expected


@BY_NAME
def test_every_variant_is_found_with_less_memory_by_ecc_or_driver(card: Gpu) -> None:
    """ECC takes 1/16."""
    for device in card.cards:
        assert gpu.of_card(device, int(card.memory_gib * GIB)) == card
        assert gpu.of_card(device, int(card.memory_gib * GIB * 15 / 16)) == card


@pytest.mark.parametrize(
    ("capability", "lacks"),
    [
        ("7.5", {"bf16", "w8a16", "w4a16", "fp8", "nvfp4"}),
        ("8.0", {"fp8", "nvfp4"}),
        ("8.6", {"fp8", "nvfp4"}),
        ("8.9", {"nvfp4"}),
        ("9.0", {"nvfp4"}),
        ("12.0", set()),
        ("12.1", set()),
    ],
)
def test_formats_go_by_the_capability(capability: str, lacks: set[str]) -> None:
    assert set(card_of(capability).formats) == set(gpu.SINCE) - lacks
    assert {form for form in gpu.SINCE if gpu.lacking((capability,), form)} == lacks


def test_only_the_capabilities_that_lack_a_format_are_named() -> None:
    assert gpu.lacking(("7.5", "8.6", "8.9", "12.0"), "fp8") == ("7.5", "8.6")
    assert gpu.lacking((), "nvfp4") == ()
    with pytest.raises(SpecError, match=r"'int9': use one of fp16, bf16, w8a8"):
        gpu.lacking(("8.6",), "int9")


def test_capabilities_compare_as_numbers() -> None:
    assert sorted(("12.0", "8.9", "10.3", "8.10"), key=gpu.numbers) == [
        "8.9",
        "8.10",
        "10.3",
        "12.0",
    ]


def test_what_is_faster_than_fp16_is_fast() -> None:
    assert card_of("12.0", fp4=8.0, fp32=0.5, bf16=1.0, int8=4.0, fp8=2.0).fast == (
        "int8",
        "fp8",
        "fp4",
    )
    assert card_of("8.6", fp32=1.0).fast == ()


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"'RTX4090' \(nearest: rtx-4090, .*`kiln profiles` lists"):
        gpu.load("RTX4090")
    with pytest.raises(SpecError, match=r"No card is called '\?': `kiln profiles` lists them all"):
        gpu.load("?")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[peak]", "watts = 450\n[peak]", "watts: Extra inputs are not permitted"),
        ('"8.9"', '"89"', "capability: String should match pattern"),
        ('"8.9"', "8.9", "capability: Input should be a valid string"),
        ("memory_gib = 24", 'memory_gib = "24"', "memory_gib: Input should be a valid number"),
        ("memory_gib = 24", "memory_gib = inf", "memory_gib: Input should be a finite number"),
        ("1008.5", "0", "bandwidth_gb_s: Input should be greater than 0"),
        ("int8 = 80.0", "int8 = -1.0", "peak.int8: Input should be greater than 0"),
        ("int8 = 80.0", "int7 = 80.0", r"unknown types \['int7'\]; known: fp32, fp16, bf16"),
        ("fp16 = 20\n", "", "needs fp16, which the others are compared with"),
        ('peak = "d"\n', "", "needs a source for each of bandwidth_gb_s, capability, memory_gib"),
        ('peak = "d"', 'peak = ""', "needs a source for each of"),
        ('["NVIDIA Mine"]', "[]", "cards: Tuple should have at least 1 item"),
        ('name = "mine"', 'name = "yours"', "says it is called 'yours': make them equal"),
        ("memory_gib = 24", "memory_gib = ", "mine is no valid TOML"),
    ],
)
def test_a_wrong_card_is_refused_by_what_is_wrong(old: str, new: str, message: str) -> None:
    assert gpu.parse(TEXT, name="mine").memory_gib == 24.0
    with pytest.raises(SpecError, match=message):
        gpu.parse(TEXT.replace(old, new, 1), name="mine")
