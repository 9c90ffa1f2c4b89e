from __future__ import annotations

import pytest

from profiles.errors import SpecError
from runners.weighting import Piece, plain_text, weighted

CASES: dict[str, list[tuple[str, float]]] = {
    "": [],
    "a cat": [("a cat", 1.0)],
    "a (red) cat": [("a ", 1.0), ("red", 1.1), (" cat", 1.0)],
    "a (red:1.5) cat": [("a ", 1.0), ("red", 1.5), (" cat", 1.0)],
    "a (red : 1.5 ) cat": [("a ", 1.0), ("red ", 1.5), (" cat", 1.0)],
    "(a:.5)(b:2)": [("a", 0.5), ("b", 2.0)],
    "(a:0)(b:-1)": [("a", 0.0), ("b", -1.0)],
    "[a]": [("a", 0.909091)],
    "((a))": [("a", 1.21)],
    "(a (b:2) c)": [("a ", 1.1), ("b", 2.2), (" c", 1.1)],
    "([a])": [("a", 1.0)],
    "(a": [("a", 1.1)],
    "a [(b": [("a b", 1.0)],
    "a) b]": [("a) b]", 1.0)],
    ":-) :(": [(":-) :", 1.0)],
    r"a \(b\) \[c\] \\": [("a (b) [c] \\", 1.0)],
    r"(a \(b\):2)": [("a (b)", 2.0)],
    r"C:\dir": [(r"C:\dir", 1.0)],
    "at 10:30 (x: y)": [("at 10:30 ", 1.0), ("x: y", 1.1)],
    "a:1.5) b": [("a:1.5) b", 1.0)],
    "two\n(lines)": [("two\n", 1.0), ("lines", 1.1)],
    "(\N{CJK UNIFIED IDEOGRAPH-732B}:1.2)": [("\N{CJK UNIFIED IDEOGRAPH-732B}", 1.2)],
    "()[]": [],
}


@pytest.mark.parametrize("prompt", CASES)
def test_brackets_become_weights(prompt: str) -> None:
    assert weighted(prompt) == [Piece(text, weight) for text, weight in CASES[prompt]]


BREAKS: dict[str, list[tuple[str, float, bool]]] = {
    "a BREAK b": [("a", 1.0, False), ("b", 1.0, True)],
    "a,\nBREAK\nb (c) d": [
        ("a,", 1.0, False),
        ("b ", 1.0, True),
        ("c", 1.1, False),
        (" d", 1.0, False),
    ],
    "(a BREAK b:1.5)": [("a", 1.5, False), ("b", 1.5, True)],
    "BREAK a": [("a", 1.0, True)],
    "a BREAK BREAK b": [("a", 1.0, False), ("", 1.0, True), ("b", 1.0, True)],
    "a BREAK (b:2)": [("a", 1.0, False), ("", 1.0, True), ("b", 2.0, False)],
    "a BREAK": [("a", 1.0, False), ("", 1.0, True)],
    "BREAKING break aBREAK": [("BREAKING break aBREAK", 1.0, False)],
}


@pytest.mark.parametrize("prompt", BREAKS)
def test_a_break_starts_a_chunk(prompt: str) -> None:
    assert weighted(prompt) == [
        Piece(text, weight, starts_chunk=starts) for text, weight, starts in BREAKS[prompt]
    ]
    assert (plain_text(prompt) is None) == any(weight != 1 for _, weight, _ in BREAKS[prompt])


def test_text_without_weights_comes_back_with_its_escapes_resolved() -> None:
    assert plain_text(r"a \(b\) c:d") == "a (b) c:d"
    assert plain_text("") == ""
    assert plain_text("a (b)") is None
    assert plain_text("a (b:1)") == "a b"
    assert plain_text("a (BREAK) b") == "a   b"


@pytest.mark.parametrize("prompt", ["(a:11)", "(a:-10.5)", "(" * 30 + "a" + ")" * 30])
def test_a_weight_that_loses_every_picture_is_refused(prompt: str) -> None:
    with pytest.raises(SpecError, match=r'gives "a" the weight .*: use -10 to 10'):
        weighted(prompt)


def test_brackets_without_end_are_refused_and_not_computed() -> None:
    with pytest.raises(SpecError, match="more than 100 brackets in each other"):
        weighted("(a" * 100_000)
    assert weighted("(a)" * 1000) == [Piece("a" * 1000, 1.1)]
