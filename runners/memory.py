"""How a bundle can be run on how much memory: what each way takes, and the best one that fits.

Everything here is arithmetic on what was measured at compile (or, before, on a family's formulas):
`kiln plan` prints it, `kiln generate` acts on it, both by `rows` and `choose`. On a processor, the
peak of a way is the largest resident size of a fresh `kiln generate` process, interpreter and
libraries included; on a card, what the card's memory holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from profiles.errors import OutOfMemory, SpecError
from runners.part_names import PARTS

if TYPE_CHECKING:
    from runners.manifest import Manifest

__all__ = [
    "Asked",
    "Feature",
    "PartMemory",
    "Parts",
    "PipelineMemory",
    "Residency",
    "Row",
    "Shape",
    "Stage",
    "Way",
    "choose",
    "gib",
    "is_guided",
    "parts_of",
    "rows",
    "smaller",
    "ways",
]

Residency = Literal["keep", "sequential"]
"""keep: every engine stays open; sequential: each is released before the next one opens."""

Feature = Literal["constant", "batch", "pixels", "pixels_squared", "tokens"]
"""What activations grow with: nothing, pictures at once, all their pixels, each picture's pixels
squared (an attention matrix that is held), tokens of all prompts."""

_STRICT = ConfigDict(frozen=True, extra="forbid")
_Coefficients = dict[Feature, float]


@dataclass(frozen=True)
class Shape:
    """What one engine is called with."""

    batch: int
    pixels: int
    """Width times height of one picture, also where the engine sees latents."""
    tokens: int
    """Of one prompt."""

    def feature(self, name: Feature) -> float:
        """The value of one feature."""
        values: dict[Feature, float] = {
            "constant": 1,
            "batch": self.batch,
            "pixels": self.batch * self.pixels,
            "pixels_squared": self.batch * float(self.pixels) ** 2,
            "tokens": self.batch * self.tokens,
        }
        return values[name]

    def bytes(self, coefficients: Mapping[Feature, float]) -> int:
        """Bytes by the coefficients of features."""
        return round(sum(factor * self.feature(name) for name, factor in coefficients.items()))


class PartMemory(BaseModel):
    """What one engine takes of memory, as a function of the shape that it is called with."""

    model_config = _STRICT

    held_bytes: int = Field(ge=0)
    """Of its files in the process's own memory: there from loading the bundle on."""
    resident_bytes: int = Field(ge=0)
    """What opening takes beside: weights after the backend's repacking, mapped ones included."""
    stays: _Coefficients
    """Of what stays beside as long as the engine is open: its buffers."""
    peak: _Coefficients
    """Of the most that is taken above `resident_bytes`, while it opens or runs."""
    per_shape: bool = False
    """Whether a second shape (a last, smaller batch) takes all of it once more."""
    source: Literal["measured", "formula"]
    """Whether the coefficients are fitted to measured shapes, or a family's formulas."""

    def open_bytes(self, shape: Shape) -> int:
        """What the engine takes between two calls, without `held_bytes`."""
        return self.resident_bytes + shape.bytes(self.stays)

    def peak_bytes(self, shape: Shape) -> int:
        """The most that it takes while it opens and runs, without `held_bytes`."""
        return max(self.open_bytes(shape), self.resident_bytes + shape.bytes(self.peak))


class PipelineMemory(BaseModel):
    """What a process that draws takes beside its engines."""

    model_config = _STRICT

    base_bytes: int = Field(ge=0)
    """Interpreter and libraries, tokenizers and schedulers, with no engine open."""
    left_bytes: int = Field(0, ge=0)
    """What closed engines leave behind, where the next one opens after them."""
    pixel_bytes: float = Field(ge=0)
    """For each pixel of all pictures of a batch, while they are made of what the decoder gave."""
    source: Literal["measured", "formula"]
    """As a part's."""


@dataclass(frozen=True)
class Way:
    """One way to run a bundle."""

    variant: str
    """The denoiser's: "int8"; the only one otherwise."""
    residency: Residency
    tiled: bool
    """Whether the VAE runs in tiles."""
    batch: int
    """Pictures at once."""

    def describe(self) -> str:
        """In words, for a sentence."""
        kept = "all parts kept" if self.residency == "keep" else "one part at a time"
        tiles = ", VAE in tiles" if self.tiled else ""
        batch = f", {self.batch} pictures at once" if self.batch > 1 else ""
        return f"{self.variant}, {kept}{tiles}{batch}"


@dataclass(frozen=True)
class Asked:
    """What is to be drawn, as far as memory depends on it."""

    width: int
    height: int
    batch: int = 1
    count: int | None = None
    """Pictures in all; None: one batch."""
    guided: bool = True
    """Whether each step runs the prompt and the negative prompt at once."""
    tokens: int = 77
    """Of the longest prompt."""
    from_picture: bool = False
    """Whether the VAE encodes too."""

    @property
    def pixels(self) -> int:
        """Of one picture."""
        return self.width * self.height


@dataclass(frozen=True)
class Parts:
    """Everything of a bundle, or of a model to be compiled, that takes memory."""

    text_encoders: tuple[PartMemory, ...]
    denoisers: Mapping[str, PartMemory]
    """Variant -> its part, best quality first."""
    decoder: PartMemory
    encoder: PartMemory | None
    pipeline: PipelineMemory
    tile: int
    """Side in pixels of the VAE's tiles; larger pictures may be decoded in tiles."""
    controls: tuple[PartMemory, ...] = ()
    """The control networks that take turns with the denoiser."""
    seamless: bool = False
    """Whether pictures in tiles are what whole ones are; else tiles come last."""
    decoder_parts: tuple[PartMemory, ...] = ()
    """Of the decoder in seamless tiles: before its attention, and after it."""
    encoder_parts: tuple[PartMemory, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One stage of drawing."""

    name: Literal["text_encoding", "encoding", "denoising", "decoding"]
    peak_bytes: int


@dataclass(frozen=True)
class Row:
    """One way to run, and what it takes."""

    way: Way
    stages: tuple[Stage, ...]

    @property
    def peak_bytes(self) -> int:
        """Of the largest stage."""
        return max(stage.peak_bytes for stage in self.stages)


def rows(
    parts: Parts,
    asked: Asked,
    *,
    variant: str | None = None,
    residency: Residency | None = None,
    tiled: bool | None = None,
) -> tuple[Row, ...]:
    """All ways to draw what is asked, best first, or those with what the keywords say.

    Quality first (the order of the variants), then speed: parts kept before sequential, whole
    pictures before tiles, large batches before small ones. There are none where the keywords
    contradict the bundle: no such variant, or a picture that is no larger than a tile.
    """
    return tuple(
        Row(way, tuple(_stages(parts, asked, way)))
        for way in ways(tuple(parts.denoisers), asked, parts.tile, seamless=parts.seamless)
        if variant in (None, way.variant)
        and residency in (None, way.residency)
        and tiled in (None, way.tiled)
    )


def choose(found: Iterable[Row], available_bytes: int) -> Row:
    """The first of the rows that fits.

    Raises OutOfMemory, saying what the smallest needs, where none does; SpecError where there are
    no rows, because the keywords of `rows` contradict the bundle.
    """
    found = tuple(found)
    if not found:
        raise SpecError(
            "The bundle can't be run that way: leave out --variant, --residency or --tiled (tiles "
            "are for pictures that are larger than the model's native size)."
        )
    for row in found:
        if row.peak_bytes <= available_bytes:
            return row
    least = min(found, key=lambda row: row.peak_bytes)
    raise OutOfMemory(
        f"No way to draw this fits into {gib(available_bytes)}: the smallest "
        f"({least.way.describe()}) needs {gib(least.peak_bytes)}. Free memory, or take a smaller "
        "--size."
    )


def smaller(found: Iterable[Row], row: Row, *, same_variant: bool) -> Row | None:
    """The next row after `row` that takes less in a stage and more in none, if there is one: a step
    of the ladder. The stage that ran out of memory needn't be the one that is predicted largest.

    Only rows of the same variant where the quality mustn't change.
    """
    found = tuple(found)
    for other in found[found.index(row) + 1 :]:
        if same_variant and other.way.variant != row.way.variant:
            continue
        pairs = list(zip(other.stages, row.stages, strict=True))
        if all(new.peak_bytes <= old.peak_bytes for new, old in pairs) and any(
            new.peak_bytes < old.peak_bytes for new, old in pairs
        ):
            return other
    return None


def parts_of(manifest: Manifest, controls: Collection[str] = ()) -> Parts | None:
    """The parts of a bundle, of its control networks those named; None where it carries no
    measurement (older than schema 4).
    """
    memory = {entry.name: entry.memory for entry in manifest.engines}
    if manifest.memory is None or any(part is None for part in memory.values()):
        return None
    by_role: dict[str, list[PartMemory]] = {}
    for entry in manifest.engines:
        assert entry.memory is not None, "was asked above"
        by_role.setdefault(entry.role, []).append(entry.memory)
    return Parts(
        text_encoders=tuple(by_role.get("text_encoder", ())),
        denoisers=dict(zip(manifest.denoisers, by_role["denoiser"], strict=True)),
        decoder=by_role["vae_decoder"][0],
        encoder=by_role.get("vae_encoder", [None])[0],
        pipeline=manifest.memory,
        tile=manifest.native_size,
        controls=tuple(part for name, part in memory.items() if name in controls and part),
        seamless=manifest.seamless,
        decoder_parts=_halves(manifest, "vae_decoder"),
        encoder_parts=_halves(manifest, "vae_encoder"),
    )


def _halves(manifest: Manifest, role: str) -> tuple[PartMemory, ...]:
    """Of the two parts of the VAE's half in this role, where it has them and they were measured."""
    forms = next((e.forms for e in manifest.components if e.role == role), {})
    found = [forms[name].memory for name in PARTS if name in forms]
    return tuple(part for part in found if part is not None)


def is_guided(manifest: Manifest, guidance: float | None = None) -> bool:
    """Whether each step runs two prompts at once: its engine has room for both, and the guidance
    (default: the bundle's, else the pipelines' own, which is more than 1) asks for it.
    """
    signature = manifest.component("denoiser").signature
    names = {spec.name for spec in signature.inputs}
    batch = {dim.name: dim.max for dim in signature.dims}.get("batch", 1)
    if batch <= int(manifest.recipe["batch"]) or "timestep_cond" in names:
        return False  # a distilled model takes the guidance as an input
    asked = manifest.defaults.get("guidance") if guidance is None else guidance
    return asked is None or asked > 1


def gib(size: int) -> str:
    """Bytes as the user reads them: to a hundredth of a GiB."""
    return f"{size / 2**30:.2f} GiB"


def ways(
    variants: tuple[str, ...], asked: Asked, tile: int, *, seamless: bool = False
) -> Iterator[Way]:
    """All ways to draw what is asked, best first; `tile` is the side of the VAE's tiles.

    Tiles come before engines are opened in turn; those that aren't `seamless` change a picture
    (each is normed, and attends, by itself), so they come after everything that doesn't.
    """
    batches = [asked.batch]
    while batches[-1] > 1:
        batches.append(-(-batches[-1] // 2))
    residencies: tuple[Residency, ...] = ("keep", "sequential")
    tiles = (False, True) if max(asked.width, asked.height) > tile else (False,)
    for variant in variants:
        kinds = [(r, t) for r in residencies for t in tiles]
        if not seamless:
            kinds.sort(key=lambda kind: kind[1])
        for residency, tiled in kinds:
            for batch in batches:
                yield Way(variant, residency, tiled, batch)


def _stages(parts: Parts, asked: Asked, way: Way) -> Iterator[Stage]:
    """Each stage's peak: the base, what earlier stages kept open, its own rise.

    Files that are held in memory are there from the start where parts are kept; else a part's are
    read when it opens, and go with it.
    """
    denoiser, rest = parts.denoisers[way.variant], (asked.count or 0) % way.batch
    turns = (denoiser, *parts.controls)
    whole = [*parts.text_encoders, *turns, parts.decoder, *filter(None, [parts.encoder])]
    keeps = way.residency == "keep"
    base = parts.pipeline.base_bytes + (sum(part.held_bytes for part in whole) if keeps else 0)
    kept, left = 0, (0 if keeps else parts.pipeline.left_bytes)
    text, peak = Shape(1, asked.pixels, asked.tokens), 0
    for part in parts.text_encoders:
        peak = max(peak, kept + part.peak_bytes(text) + _read(part, way))
        kept = kept + part.open_bytes(text) if keeps else left
    yield Stage("text_encoding", base + peak)

    pictures = _picture_bytes(parts, asked, way)
    if asked.from_picture and parts.encoder is not None:
        peak, stays = _coded(parts, parts.encoder, parts.encoder_parts, asked, way)
        yield Stage("encoding", base + kept + peak + pictures + _read(parts.encoder, way))
        kept += stays if keeps else 0

    prompts = 2 if asked.guided else 1
    step = Shape(prompts * way.batch, asked.pixels, asked.tokens)
    last = Shape(prompts * rest, asked.pixels, asked.tokens)
    stays = sum(part.open_bytes(step) + _again(part, last) for part in turns)
    rise = max(part.peak_bytes(step) - part.open_bytes(step) for part in turns)
    yield Stage("denoising", base + kept + stays + rise + sum(_read(part, way) for part in turns))
    kept += stays if keeps else 0

    peak, opened = _coded(parts, parts.decoder, parts.decoder_parts, asked, way)
    decoding = max(peak, opened + pictures)
    if way.tiled:  # they are put together beside the tile's engine
        decoding = peak + pictures
    if not way.tiled:
        decoding += _again(parts.decoder, Shape(rest, asked.pixels, asked.tokens))
    yield Stage("decoding", base + kept + decoding + _read(parts.decoder, way))


def _coded(
    parts: Parts, half: PartMemory, pair: tuple[PartMemory, ...], asked: Asked, way: Way
) -> tuple[int, int]:
    """The peak of a half of the VAE, and what stays open of it: of two parts, the one that is last
    may be either, so the larger.
    """
    shape = Shape(way.batch, asked.pixels, asked.tokens)
    if way.tiled:
        shape = Shape(1, parts.tile**2, asked.tokens)
    open_parts = pair if way.tiled and pair else (half,)
    peak = max(part.peak_bytes(shape) for part in open_parts)
    return peak, max(part.open_bytes(shape) for part in open_parts)


def _read(part: PartMemory, way: Way) -> int:
    """What a part's files take while it is open, where they aren't there from the start."""
    return part.held_bytes if way.residency == "sequential" else 0


def _again(part: PartMemory, shape: Shape) -> int:
    """What a last, smaller batch takes beside the others' shape; nothing where there is none."""
    return part.open_bytes(shape) if part.per_shape and shape.batch else 0


def _picture_bytes(parts: Parts, asked: Asked, way: Way) -> int:
    return round(parts.pipeline.pixel_bytes * way.batch * asked.pixels)
