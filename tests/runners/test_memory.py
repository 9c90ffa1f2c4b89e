"""Ways to run, what they take, and which is taken: arithmetic, without an engine."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from profiles.errors import OutOfMemory, SpecError
from runners.memory import (
    Asked,
    PartMemory,
    Parts,
    PipelineMemory,
    Row,
    Shape,
    choose,
    rows,
    smaller,
)

MIB = 1 << 20


def part(resident: int, per_pixel: float = 0.0, *, held: int = 0, **more: object) -> PartMemory:
    return PartMemory.model_validate(
        {
            "held_bytes": held,
            "resident_bytes": resident,
            "stays": {"pixels": per_pixel},
            "peak": {"constant": 10.0, "pixels": 2 * per_pixel},
            "source": "formula",
            **more,
        }
    )


PARTS = Parts(
    text_encoders=(part(500), part(300)),
    denoisers={"none": part(8000, 1.0), "int8": part(2000, 1.0)},
    decoder=part(400, 4.0),
    encoder=part(200, 4.0),
    pipeline=PipelineMemory(base_bytes=1000, pixel_bytes=3, source="formula"),
    tile=16,
)
ASKED = Asked(32, 32, 4)


def test_rows_are_ordered_by_quality_then_speed() -> None:
    found = rows(PARTS, ASKED)
    assert [(row.way.variant, row.way.residency, row.way.tiled) for row in found[::3]] == [
        (variant, residency, tiled)
        for variant in ("none", "int8")
        for tiled in (False, True)
        for residency in ("keep", "sequential")
    ]
    assert [row.way.batch for row in found[:3]] == [4, 2, 1]


def test_seamless_tiles_come_before_engines_in_turn() -> None:
    found = rows(replace(PARTS, seamless=True), ASKED, variant="none")
    assert [(row.way.residency, row.way.tiled) for row in found[::3]] == [
        ("keep", False),
        ("keep", True),
        ("sequential", False),
        ("sequential", True),
    ]


@pytest.mark.parametrize(("after", "peak"), [(50, 100 + 10 + 2 * 16 * 16), (5000, 5000 + 10)])
def test_the_larger_part_of_a_half_counts_in_seamless_tiles(after: int, peak: int) -> None:
    """One is open at a time, and one tile at a time goes through it, however large the picture."""
    cut = replace(PARTS, seamless=True, decoder_parts=(part(100, 1.0), part(after)))
    row = rows(cut, Asked(32, 32, 2), residency="sequential", tiled=True)[0]
    assert row.stages[-1].peak_bytes == 1000 + peak + 2 * 3 * 32 * 32


def test_a_picture_no_larger_than_a_tile_has_no_rows_in_tiles() -> None:
    assert not any(row.way.tiled for row in rows(PARTS, Asked(16, 16)))
    assert any(row.way.tiled for row in rows(PARTS, Asked(16, 24)))


def test_kept_parts_add_up_and_sequential_ones_do_not() -> None:
    pixels = 32 * 32
    kept = rows(PARTS, Asked(32, 32, guided=True), residency="keep", tiled=False)[0]
    peaks = {stage.name: stage.peak_bytes for stage in kept.stages}
    assert peaks["text_encoding"] == 1000 + 500 + 300 + 10
    assert peaks["denoising"] == 1000 + 800 + 8000 + 10 + 2 * 2 * pixels
    decoder = max(400 + 10 + 8 * pixels, 400 + 4 * pixels + 3 * pixels)
    assert peaks["decoding"] == 1000 + 800 + 8000 + 2 * pixels + decoder
    alone = rows(PARTS, Asked(32, 32), residency="sequential", tiled=False)[0]
    peaks = {stage.name: stage.peak_bytes for stage in alone.stages}
    assert peaks["text_encoding"] == 1000 + 500 + 10
    assert peaks["denoising"] == 1000 + 8000 + 10 + 2 * 2 * pixels
    assert peaks["decoding"] == 1000 + decoder
    assert alone.peak_bytes == peaks["denoising"]


def test_what_closed_engines_leave_counts_from_the_second_on() -> None:
    left = replace(PARTS, pipeline=PARTS.pipeline.model_copy(update={"left_bytes": 50}))
    for way, more in (("keep", [0, 0, 0]), ("sequential", [0, 50, 50])):
        plain, beside = (
            rows(parts, ASKED, residency=way, tiled=False)[0] for parts in (PARTS, left)
        )
        pairs = zip(plain.stages, beside.stages, strict=True)
        assert [after.peak_bytes - before.peak_bytes for before, after in pairs] == more


def test_control_networks_stay_open_beside_the_denoiser() -> None:
    pixels = 2 * 32 * 32
    controlled = replace(PARTS, controls=(part(3000, 2.0), part(1000, 1.0)))
    alone = rows(controlled, Asked(32, 32), residency="sequential", tiled=False)[0]
    peaks = {stage.name: stage.peak_bytes for stage in alone.stages}
    stays = 8000 + 3000 + 1000 + (1 + 2 + 1) * pixels
    assert peaks["denoising"] == 1000 + stays + 10 + 2 * pixels


def test_files_in_memory_count_in_every_stage() -> None:
    held = replace(PARTS, encoder=part(200, 4.0, held=77))
    kept = (rows(parts, ASKED, residency="keep") for parts in (PARTS, held))
    for before, after in zip(*kept, strict=True):
        assert after.peak_bytes == before.peak_bytes + 77


def test_files_of_one_part_at_a_time_are_there_while_it_is_open() -> None:
    held = replace(PARTS, decoder=part(400, 4.0, held=77))
    alone = (rows(parts, ASKED, residency="sequential")[0] for parts in (PARTS, held))
    before, after = ({s.name: s.peak_bytes for s in row.stages} for row in alone)
    assert after == {**before, "decoding": before["decoding"] + 77}


def test_tiles_make_decoding_nearly_flat_in_the_picture() -> None:
    def decoding(side: int) -> int:
        row = rows(PARTS, Asked(side, side), residency="sequential", tiled=True)[0]
        return row.stages[-1].peak_bytes

    assert decoding(64) - decoding(32) == 3 * (64**2 - 32**2)


def test_starting_from_a_picture_adds_a_stage() -> None:
    row = rows(PARTS, replace(ASKED, from_picture=True))[0]
    assert [stage.name for stage in row.stages] == [
        "text_encoding",
        "encoding",
        "denoising",
        "decoding",
    ]


def test_guidance_takes_two_prompts_a_step() -> None:
    with_, without = (rows(PARTS, replace(ASKED, guided=on))[0] for on in (True, False))
    assert with_.peak_bytes > without.peak_bytes


def test_a_last_smaller_batch_counts_where_each_shape_is_compiled() -> None:
    compiled = replace(PARTS, denoisers={"none": part(8000, 1.0, per_shape=True)})
    even, odd = (
        rows(compiled, Asked(32, 32, 2, count=count), residency="keep", tiled=False)[0]
        for count in (4, 5)
    )
    assert odd.peak_bytes - even.peak_bytes == 8000 + 2 * 32 * 32


def test_the_first_that_fits_is_chosen() -> None:
    found = rows(PARTS, ASKED)
    everything = max(row.peak_bytes for row in found)
    assert choose(found, everything) == found[0]
    for before, after in pairwise(sorted({row.peak_bytes for row in found})):
        picked = choose(found, after - 1)
        assert picked.peak_bytes <= before
        assert all(row.peak_bytes >= after for row in found[: found.index(picked)])


def test_too_little_memory_says_what_the_smallest_needs() -> None:
    big = replace(PARTS, denoisers={"int8": part(3 << 30)})
    with pytest.raises(OutOfMemory, match=r"int8, one part at a time.*needs 3\.00 GiB") as caught:
        choose(rows(big, Asked(8, 8)), 1 << 30)
    assert "1.00 GiB" in str(caught.value)
    assert "--size" in str(caught.value)
    assert caught.value.exit_code == 13


def test_ways_that_the_bundle_has_not_are_a_wrong_request() -> None:
    with pytest.raises(SpecError, match="--variant"):
        choose(rows(PARTS, Asked(8, 8), tiled=True), 1 << 40)


def test_the_ladder_goes_down_and_keeps_the_variant_unless_it_may_not() -> None:
    found = rows(PARTS, ASKED)
    taken: list[Row] = [found[0]]
    while (after := smaller(found, taken[-1], same_variant=True)) is not None:
        taken.append(after)
    assert {row.way.variant for row in taken} == {"none"}
    for before, after in pairwise(taken):
        pairs = list(zip(before.stages, after.stages, strict=True))
        assert all(new.peak_bytes <= old.peak_bytes for old, new in pairs)
        assert any(new.peak_bytes < old.peak_bytes for old, new in pairs)
    assert taken[1].way.batch == 2
    last = smaller(found, taken[-1], same_variant=False)
    assert last is not None
    assert last.way.variant == "int8"


def test_shapes_features_are_what_their_names_say() -> None:
    shape = Shape(2, 100, 77)
    assert shape.bytes({"constant": 1, "batch": 1, "pixels": 1}) == 1 + 2 + 200
    assert shape.bytes({"pixels_squared": 1, "tokens": 1}) == 20000 + 154


def test_parts_survive_a_round_trip() -> None:
    one = PARTS.denoisers["none"]
    assert PartMemory.model_validate_json(one.model_dump_json()) == one
