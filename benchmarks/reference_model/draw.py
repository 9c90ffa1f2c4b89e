"""Draw a scene as a 64x64 RGB picture: antialiased things, textured or gradient backgrounds."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from benchmarks.reference_model.captions import BACKGROUND_RGB, RGB, Background, Scene, Thing

SIDE = 64
"""Width and height of a picture in pixels."""

CENTRES = (15.0, 32.0, 49.0)
"""Centres of the grid's rows and columns in pixels."""

RADIUS = {"small": 8.5, "large": 13.5}
"""Half the width of a thing in pixels."""

_SUPERSAMPLE = 6
_PATCH = 32
_EDGE = 1.3
_JITTER_HALVES = 2

Floats = NDArray[np.float32]


def draw_scene(scene: Scene, seed: int) -> NDArray[np.uint8]:
    """Return the picture of a scene as [64, 64, 3] uint8.

    The seed decides what the caption leaves open: texture, phase, a pixel of displacement.
    """
    rng = np.random.default_rng(seed)
    picture = _BACKGROUNDS[scene.background.kind](scene.background, rng)
    for thing in scene.things:
        _paint(picture, thing, rng)
    return _pixels(picture)


def draw_before(scene: Scene, seed: int, ground: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return the things of `draw_scene`, where it paints them, before one colour."""
    rng = _past_background(scene, seed)
    picture = np.tile(np.asarray(ground, np.float32), (SIDE, SIDE, 1))
    for thing in scene.things:
        _paint(picture, thing, rng)
    return _pixels(picture)


def draw_coverage(scene: Scene, seed: int) -> Floats:
    """Return how much of each pixel the things of `draw_scene` cover, [64, 64] in 0..1."""
    rng = _past_background(scene, seed)
    covered = np.zeros((SIDE, SIDE), np.float32)
    for thing in scene.things:
        area, crop, body, _ = _placed(thing, rng)
        covered[area] = np.maximum(covered[area], body[crop])
    return covered


def _past_background(scene: Scene, seed: int) -> np.random.Generator:
    """The generator as `draw_scene` has it when the background is done."""
    rng = np.random.default_rng(seed)
    _BACKGROUNDS[scene.background.kind](scene.background, rng)
    return rng


def _pixels(picture: Floats) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.clip(picture + 0.5, 0, 255).astype(np.uint8)
    return pixels


Area = tuple[slice, slice]


def _placed(thing: Thing, rng: np.random.Generator) -> tuple[Area, Area, Floats, Floats]:
    """Where a thing lies in the picture, displaced by up to one pixel each way: the picture's area,
    that area within its masks, and the masks of the shape and of its core.
    """
    shift = rng.integers(-_JITTER_HALVES, _JITTER_HALVES + 1, size=2)
    top2 = int(2 * CENTRES[thing.cell // 3] + shift[0]) - _PATCH
    left2 = int(2 * CENTRES[thing.cell % 3] + shift[1]) - _PATCH
    body, core = _masks(thing.shape, thing.size, top2 % 2, left2 % 2)
    top, left = top2 // 2, left2 // 2
    rows = slice(max(0, top), min(SIDE, top + _PATCH + 1))
    columns = slice(max(0, left), min(SIDE, left + _PATCH + 1))
    crop = np.s_[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return (rows, columns), crop, body, core


def _paint(picture: Floats, thing: Thing, rng: np.random.Generator) -> None:
    """Blend a thing into the picture [64, 64, 3]."""
    area, crop, body, core = _placed(thing, rng)
    colour = np.asarray(RGB[thing.colour], np.float32)
    edge = edge_of(thing.colour)
    light = np.linspace(1.05, 0.93, _PATCH + 1, dtype=np.float32)[:, None, None]
    paint = edge + (np.minimum(colour * light, 255) - edge) * core[..., None]
    picture[area] += (paint[crop] - picture[area]) * body[crop][..., None]


def edge_of(colour: str) -> Floats:
    """The RGB [3] of the edge of things of this colour: darker, but for black."""
    rgb = np.asarray(RGB[colour], np.float32)
    edge: Floats = rgb * 0.62 if colour != "black" else rgb + 50
    return edge


@lru_cache(maxsize=256)
def _masks(shape: str, size: str, down: int, right: int) -> tuple[Floats, Floats]:
    """Coverage of a shape and of the shape without its edge, [33, 33] in 0..1.

    `down` and `right` displace by half a pixel each.
    """
    steps = (np.arange((_PATCH + 1) * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE
    y = (steps - _PATCH / 2 - down / 2)[:, None]
    x = (steps - _PATCH / 2 - right / 2)[None, :]
    distance = _SHAPES[shape](x, y, RADIUS[size])
    return _coverage(distance <= 0), _coverage(distance <= -_EDGE)


def _coverage(inside: NDArray[np.bool_]) -> Floats:
    tiles = inside.reshape(_PATCH + 1, _SUPERSAMPLE, _PATCH + 1, _SUPERSAMPLE)
    coverage: Floats = tiles.mean(axis=(1, 3), dtype=np.float32)
    return coverage


Grid = NDArray[np.float64]


def _circle(x: Grid, y: Grid, radius: float) -> Grid:
    return np.hypot(x, y) - radius


def _ring(x: Grid, y: Grid, radius: float) -> Grid:
    return np.abs(np.hypot(x, y) - radius * 0.74) - radius * 0.26


def _square(x: Grid, y: Grid, radius: float) -> Grid:
    return np.maximum(np.abs(x), np.abs(y)) - radius * 0.88


def _cross(x: Grid, y: Grid, radius: float) -> Grid:
    arm = radius * 0.34
    wide = np.maximum(np.abs(x) - radius, np.abs(y) - arm)
    return np.minimum(wide, np.maximum(np.abs(y) - radius, np.abs(x) - arm))


def _triangle(x: Grid, y: Grid, radius: float) -> Grid:
    slope = np.abs(x) * 0.874 - (y + radius) * 0.486
    triangle: Grid = np.maximum(slope, y - radius * 0.8)
    return triangle


def _star(x: Grid, y: Grid, radius: float) -> Grid:
    """Five points: the distance to the edge between a tip and a notch, folded into one tenth."""
    outer, inner, wedge = radius * 1.17, radius * 0.52, np.pi / 5
    y = y - radius * 0.06
    angle = np.arctan2(x, -y)
    folded = np.abs((angle + wedge) % (2 * wedge) - wedge)
    px, py = np.hypot(x, y) * np.cos(folded), np.hypot(x, y) * np.sin(folded)
    ex, ey = inner * np.cos(wedge) - outer, inner * np.sin(wedge)
    star: Grid = ((px - outer) * ey - py * ex) / float(np.hypot(ex, ey))
    return star


def _heart(x: Grid, y: Grid, radius: float) -> Grid:
    """Two discs over a square standing on its corner."""
    lobe, x = radius * 0.52, np.abs(x)
    y = y + radius * 0.06
    disc = np.hypot(x - radius * 0.47, y + radius * 0.36) - lobe
    tip = (x + y - radius * 0.94) * 0.7071
    body = np.maximum(tip, x * 0.2 - y - radius * 0.36)
    return np.minimum(disc, body)


_SHAPES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
}

_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + np.float32(0.5)


def _rgb(background: Background, index: int) -> Floats:
    return np.asarray(BACKGROUND_RGB[background.paints[index]], np.float32)


def _blend(background: Background, amount: Floats) -> Floats:
    """Mix the two colours of a background: [64, 64] in 0..1 -> [64, 64, 3]."""
    first, second = _rgb(background, 0), _rgb(background, 1)
    return first + (second - first) * amount[..., None]


def _plain(background: Background, _rng: np.random.Generator) -> Floats:
    return np.tile(_rgb(background, 0), (SIDE, SIDE, 1))


def _gradient(background: Background, _rng: np.random.Generator) -> Floats:
    along = _X if background.direction == "horizontal" else _Y
    return _blend(background, along / SIDE)


_STRIPE_AXES = {"horizontal": (0.0, 1.0), "vertical": (1.0, 0.0), "diagonal": (0.7071, 0.7071)}


def _striped(background: Background, rng: np.random.Generator) -> Floats:
    """Stripes of 4 pixels; the phase is free, in whole pixels."""
    across, down = _STRIPE_AXES[background.direction]
    wave = np.sin((_X * across + _Y * down + rng.integers(8)) * np.float32(np.pi / 4))
    return _blend(background, np.clip(0.5 + wave * 1.3, 0, 1))


def _dotted(background: Background, rng: np.random.Generator) -> Floats:
    """Dots of 5 pixels, every second row moved by half the spacing of 10.67 pixels."""
    pitch = SIDE / 6
    y = (_Y + rng.integers(11)) / pitch
    x = (_X + rng.integers(11)) / pitch + 0.5 * (np.floor(y) % 2)
    distance = np.hypot(x % 1 - 0.5, y % 1 - 0.5) * pitch
    return _blend(background, np.clip(2.9 - distance, 0, 1).astype(np.float32))


def _smooth_noise(rng: np.random.Generator, rows: int, columns: int) -> Floats:
    """White noise on a coarse lattice, linearly interpolated: [64, 64], standard deviation ~0.7."""
    lattice = rng.standard_normal((rows + 1, columns + 1)).astype(np.float32)
    return (_ramp(rows) @ lattice @ _ramp(columns).T).astype(np.float32)


@lru_cache(maxsize=16)
def _ramp(knots: int) -> Floats:
    """Linear interpolation from knots + 1 lattice points to 64 pixels: [64, knots + 1]."""
    at = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE * knots
    gaps = np.abs(at[:, None] - np.arange(knots + 1, dtype=np.float32))
    ramp: Floats = np.maximum(0, 1 - gaps)
    return ramp


def _grainy(background: Background, rng: np.random.Generator) -> Floats:
    """Grey grain of about 2 to 4 pixels over a colour."""
    grain = _smooth_noise(rng, 16, 16) * 0.6 + _smooth_noise(rng, 26, 26)
    return _rgb(background, 0) + 24 * grain[..., None]


def _wooden(background: Background, rng: np.random.Generator) -> Floats:
    """Upright boards of 16 pixels: long warped grain, dark joints, one tone for each board."""
    base = _rgb(background, 0)
    boards = ((_X + rng.integers(16)) // 16).astype(int)
    tone = rng.uniform(-0.09, 0.09, 8).astype(np.float32)[boards]
    warp = _smooth_noise(rng, 4, 8) * 1.6 + tone * 40
    grain = np.sin(_X * 1.5 + warp * 2.0) * 0.07 + _smooth_noise(rng, 5, 28) * 0.05
    edge = (boards != np.roll(boards, 1, axis=1)) & (_X > 1)
    wood: Floats = base * (1 + tone + grain - 0.3 * edge)[..., None]
    return wood


_BACKGROUNDS = {
    "plain": _plain,
    "gradient": _gradient,
    "striped": _striped,
    "dotted": _dotted,
    "grainy": _grainy,
    "wooden": _wooden,
}
