"""The caption grammar: sample a scene, say it in words, read the words back.

A caption names one or two things (size, colour, shape, then position, so that in a causal text
encoder the position's token has seen all the rest) and, last, the background.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart")
SIZES = ("small", "large")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black")
POSITIONS = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the centre",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
"""Names of the cells of a 3x3 grid, row by row from the top left."""

BACKGROUND_KINDS = ("plain", "gradient", "striped", "dotted", "grainy", "wooden")
BACKGROUND_COLOURS = ("white", "grey", "black", "blue", "green", "yellow", "pink", "purple")
WOODS = ("light", "dark")
GRADIENT_DIRECTIONS = ("horizontal", "vertical")
STRIPE_DIRECTIONS = ("horizontal", "vertical", "diagonal")
PHRASINGS = 4

RGB = {
    "red": (216, 38, 44),
    "orange": (246, 132, 24),
    "yellow": (250, 214, 36),
    "green": (36, 146, 66),
    "blue": (34, 84, 204),
    "purple": (124, 48, 164),
    "pink": (242, 98, 168),
    "white": (250, 250, 248),
    "black": (26, 26, 30),
}
"""sRGB of each thing's colour, 0..255: saturated, at least 90 apart (Euclidean)."""

BACKGROUND_RGB = {
    "white": (242, 241, 236),
    "grey": (148, 150, 156),
    "black": (52, 54, 64),
    "blue": (138, 186, 236),
    "green": (158, 212, 160),
    "yellow": (248, 226, 146),
    "pink": (246, 184, 202),
    "purple": (184, 160, 226),
    "light wood": (214, 172, 116),
    "dark wood": (118, 76, 48),
}
"""sRGB of each background's colour, 0..255: softer than the things in front of them."""

_CONTRAST = 85.0
_PAIR_CONTRAST = 60.0
_HELD_OUT_ONE_IN = 40


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    shape: str
    colour: str
    size: str
    position: str

    @property
    def cell(self) -> int:
        """Index 0..8 of the position in the 3x3 grid, row by row."""
        return POSITIONS.index(self.position)


@dataclass(frozen=True)
class Background:
    """What is behind the things: a kind, its colours, its direction ("" where it has none)."""

    kind: str
    colours: tuple[str, ...]
    direction: str = ""

    @property
    def paints(self) -> tuple[str, ...]:
        """Keys of `BACKGROUND_RGB` of the colours that the background shows."""
        return tuple(f"{c} wood" if self.kind == "wooden" else c for c in self.colours)


@dataclass(frozen=True)
class Scene:
    """One or two things before a background."""

    things: tuple[Thing, ...]
    background: Background

    @property
    def held_out(self) -> bool:
        """Whether the scene is kept from training: one in 40, by a checksum of its words."""
        words = sorted(_thing_words(thing) for thing in self.things)
        text = "|".join([*words, _background_words(self.background)])
        return zlib.crc32(text.encode()) % _HELD_OUT_ONE_IN == 0


def sample_scene(rng: np.random.Generator, *, two_things: float = 0.6) -> Scene:
    """Draw a scene; `two_things` is the probability of a second thing."""
    background = _sample_background(rng)
    visible = [c for c in COLOURS if _contrasts(c, background)]
    count = 2 if rng.random() < two_things else 1
    while True:
        things = tuple(
            Thing(_pick(rng, SHAPES), _pick(rng, visible), _pick(rng, SIZES), _pick(rng, POSITIONS))
            for _ in range(count)
        )
        if count == 1 or _apart(*things):
            return Scene(things, background)


def sample_scenes(seed: int, count: int, *, held_out: bool, two_things: float = 0.6) -> list[Scene]:
    """Return `count` scenes of the training set, or of the held-out set."""
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng, two_things=two_things)
        if scene.held_out == held_out:
            scenes.append(scene)
    return scenes


def caption_of(scene: Scene, phrasing: int = 0) -> str:
    """Say a scene in words, in one of `PHRASINGS` ways.

    The two things come in the scene's order for even phrasings and swapped for odd ones.
    """
    words = [_thing_words(thing) for thing in scene.things]
    if phrasing % 2:
        words.reverse()
    things = (" and ", " with ")[phrasing // 2 % 2].join(words)
    return f"{things}, {_background_words(scene.background)}"


def parse_caption(caption: str) -> Scene:
    """Read a caption back into its scene.

    Raises `profiles.errors.SpecError` for text outside the grammar.
    """
    things_text, _, background_text = caption.strip().lower().rpartition(", ")
    background = _parse_background(background_text)
    matches = [_THING.fullmatch(part) for part in re.split(r" (?:and|with) (?=a )", things_text)]
    things = tuple(Thing(m["shape"], m["colour"], m["size"], m["position"]) for m in matches if m)
    if background is None or not 1 <= len(matches) <= 2 or len(things) != len(matches):
        _refuse(caption)
    assert background is not None
    return Scene(things, background)


def _refuse(caption: str) -> None:
    from profiles.errors import SpecError

    example = caption_of(sample_scene(np.random.default_rng(0)))
    raise SpecError(
        f"the reference model's grammar cannot read the caption {caption!r}; legal captions read "
        f"like {example!r}: sizes {SIZES}, colours {COLOURS}, shapes {SHAPES}, positions "
        f"{POSITIONS}; list some with `cat benchmarks/reference_model/model/prompts/*.txt`"
    )


def _pick(rng: np.random.Generator, names: tuple[str, ...] | list[str]) -> str:
    return names[int(rng.integers(len(names)))]


def _sample_background(rng: np.random.Generator) -> Background:
    kind = _pick(rng, BACKGROUND_KINDS)
    if kind == "wooden":
        return Background(kind, (_pick(rng, WOODS),))
    first = _pick(rng, BACKGROUND_COLOURS)
    if kind in ("plain", "grainy"):
        return Background(kind, (first,))
    far = [
        c
        for c in BACKGROUND_COLOURS
        if _distance(BACKGROUND_RGB[c], BACKGROUND_RGB[first]) > _PAIR_CONTRAST
    ]
    pair = (first, _pick(rng, far))
    if kind == "gradient":
        return Background(kind, pair, _pick(rng, GRADIENT_DIRECTIONS))
    if kind == "dotted":
        return Background(kind, pair)
    ordered = tuple(sorted(pair, key=BACKGROUND_COLOURS.index))
    return Background(kind, ordered, _pick(rng, STRIPE_DIRECTIONS))


def _distance(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    return float(np.linalg.norm(np.subtract(a, b)))


def _contrasts(colour: str, background: Background) -> bool:
    return all(_distance(RGB[colour], BACKGROUND_RGB[p]) > _CONTRAST for p in background.paints)


def _apart(first: Thing, second: Thing) -> bool:
    """Whether two things cannot touch: no shared side, and no shared corner if both are large."""
    rows, columns = abs(first.cell // 3 - second.cell // 3), abs(first.cell % 3 - second.cell % 3)
    if max(rows, columns) >= 2:
        return True
    return rows == columns == 1 and "small" in (first.size, second.size)


def _thing_words(thing: Thing) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape} {thing.position}"


def _background_words(background: Background) -> str:
    kind, colours, direction = background.kind, background.colours, background.direction
    if kind == "gradient":
        return f"on a {direction} gradient from {colours[0]} to {colours[1]}"
    if kind == "striped":
        return f"on {direction} {colours[0]} and {colours[1]} stripes"
    if kind == "dotted":
        return f"on a {colours[0]} background with {colours[1]} dots"
    return (
        f"on a {kind} {colours[0]} background"
        if kind != "wooden"
        else (f"on a {colours[0]} wooden background")
    )


def _any(names: tuple[str, ...]) -> str:
    return "|".join(sorted(names, key=len, reverse=True))


_THING = re.compile(
    rf"a (?P<size>{_any(SIZES)}) (?P<colour>{_any(COLOURS)}) (?P<shape>{_any(SHAPES)}) "
    rf"(?P<position>{_any(POSITIONS)})"
)
_PAINT = _any(BACKGROUND_COLOURS)
_BACKGROUNDS = (
    re.compile(rf"on a (?P<kind>plain|grainy) (?P<first>{_PAINT}) background"),
    re.compile(rf"on a (?P<first>{_any(WOODS)}) (?P<kind>wooden) background"),
    re.compile(rf"on a (?P<first>{_PAINT}) background with (?P<second>{_PAINT}) (?P<kind>dots)"),
    re.compile(
        rf"on a (?P<direction>{_any(GRADIENT_DIRECTIONS)}) (?P<kind>gradient) "
        rf"from (?P<first>{_PAINT}) to (?P<second>{_PAINT})"
    ),
    re.compile(
        rf"on (?P<direction>{_any(STRIPE_DIRECTIONS)}) (?P<first>{_PAINT}) and "
        rf"(?P<second>{_PAINT}) (?P<kind>stripes)"
    ),
)
_KIND_OF_WORD = {"dots": "dotted", "stripes": "striped"}


def _parse_background(text: str) -> Background | None:
    found = next((m for pattern in _BACKGROUNDS if (m := pattern.fullmatch(text))), None)
    if found is None:
        return None
    named = found.groupdict()
    kind = _KIND_OF_WORD.get(named["kind"], named["kind"])
    colours = (named["first"], *([named["second"]] if named.get("second") else []))
    if kind == "striped":
        colours = tuple(sorted(colours, key=BACKGROUND_COLOURS.index))
    return Background(kind, colours, named.get("direction") or "")
