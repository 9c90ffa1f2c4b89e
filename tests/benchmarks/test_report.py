"""The report: one offline page that escapes what it is given, JSON that round-trips, a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks import plots, report
from benchmarks.comparison import Comparison
from benchmarks.gallery import gallery
from benchmarks.measure import Measured
from benchmarks.metrics import StepSqnr

Make = Callable[..., Measured]
Tally = Callable[..., Comparison]

HOSTILE = (
    """<script>alert("x")</script> '"><img src=http://evil.example/x onerror=alert(1)> {{ 7*7 }}"""
)


class Page(HTMLParser):
    """What a browser would see: tags, addresses, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_document_round_trips_and_has_a_row_a_level(
    measurement: Make, compare_measured: Tally, tmp_path: Path
) -> None:
    comparison = compare_measured(measurement("a", "b"))
    document, _ = report.write(comparison, tmp_path)
    text = document.read_text(encoding="utf-8")
    assert Comparison.model_validate_json(text) == comparison
    assert "NaN" not in text
    assert "Infinity" not in text
    asked = "name bytes denoiser_bytes bytes_vs_fp32 seconds_per_image speedup peak_rss_bytes"
    asked += " psnr_db ssim flip sqnr_db adherence"
    for row in json.loads(text)["levels"]:
        assert set(asked.split()) <= set(row)


def test_the_page_is_one_file_without_script_or_address(
    measurement: Make, compare_measured: Tally, tmp_path: Path
) -> None:
    page = Page(report.render(compare_measured(measurement("a", "b")), tmp_path))
    assert {a.split(",")[0] for a in page.addresses if not a.startswith("#")} == {
        "data:image/png;base64"
    }
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert page.tags.count("img") == 2 * (3 + 2)
    assert page.tags.count("svg") == 2


def test_prompts_are_text_whatever_they_hold(
    measurement: Make, compare_measured: Tally, tmp_path: Path
) -> None:
    page = Page(report.render(compare_measured(measurement(HOSTILE)), tmp_path))
    assert "script" not in page.tags
    assert page.handlers == []
    assert not [a for a in page.addresses if "evil" in a]
    assert HOSTILE in " ".join(" ".join(page.words).split())


def test_what_was_not_measured_is_a_dash(
    measurement: Make, compare_measured: Tally, tmp_path: Path
) -> None:
    result = measurement("a", side=8)  # too small for SSIM
    result.sqnr, result.peaks, result.complete = {}, {}, False
    comparison = compare_measured(result)
    text = " ".join(Page(report.render(comparison, tmp_path)).words)
    assert "None" not in text
    assert "nan" not in text.lower().split()
    assert "Interrupted: 1 of 1" in text
    assert report.table(comparison).count("\N{EN DASH}") > 6


def test_the_table_has_a_line_a_level(measurement: Make, compare_measured: Tally) -> None:
    lines = report.table(compare_measured(measurement("a"))).splitlines()
    assert [line.split()[0] for line in lines] == ["level", "diffusers", "int8", "int4"]
    assert "3.00x" in lines[2]
    assert "30.0" in lines[2]


def test_the_gallery_shows_the_worst_pictures_even_where_not_all_fit(
    measurement: Make, compare_measured: Tally, tmp_path: Path
) -> None:
    comparison = compare_measured(measurement(*(f"prompt {i}" for i in range(60)), side=8))
    groups = gallery(comparison, tmp_path)
    assert len(groups) == 48
    assert groups[-1].index == comparison.levels[2].worst
    assert [group.index for group in groups] == sorted(group.index for group in groups)


def test_marks_stay_inside_the_plot_when_a_level_equals_the_reference(
    measurement: Make, compare_measured: Tally
) -> None:
    result = measurement("a")
    for step in result.sqnr["int8"].steps:
        step.error = 0.0
    plot = plots.speed_plot(compare_measured(result))
    assert plot is not None
    exact, worse = plot.marks
    assert exact.label.startswith("200.0 dB")
    assert exact.y == plot.top
    assert plot.top < worse.y < plot.bottom
    assert all(plot.left <= mark.x <= plot.right for mark in plot.marks)
    assert max(mark.radius for mark in plot.marks) == exact.radius


def test_labels_of_levels_that_nearly_coincide_do_not_cover_each_other(
    measurement: Make, compare_measured: Tally
) -> None:
    result = measurement("a")
    result.sqnr["int4"] = result.sqnr["int8"]
    for _, taken in result.rounds:
        taken["int4"] = replace(taken["int4"], seconds=taken["int8"].seconds)
    plot = plots.speed_plot(compare_measured(result))
    assert plot is not None
    first, second = plot.marks
    assert (first.x, first.y) == (second.x, second.y)
    assert second.label_y - first.label_y >= 30  # two lines of 13 and 15 units


def test_there_are_no_plots_without_a_measured_sqnr(
    measurement: Make, compare_measured: Tally
) -> None:
    result = measurement("a")
    result.sqnr = {}
    comparison = compare_measured(result)
    assert plots.speed_plot(comparison) is None
    assert plots.step_plot(comparison) is None


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_step_ticks_are_whole_steps(measurement: Make, compare_measured: Tally, steps: int) -> None:
    result = measurement("a")
    for name in result.sqnr:
        result.sqnr[name] = StepSqnr()
        for step in range(steps):
            result.sqnr[name].add(step, signal=100.0, noise=1.0 + step)
    plot = plots.step_plot(compare_measured(result))
    assert plot is not None
    assert all(label.isdecimal() for _, label in plot.x_ticks)
    assert len(plot.lines[0].points) == steps
