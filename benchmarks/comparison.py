"""The nouns of a comparison: what was asked, one picture, one level's row, the whole document.

`Comparison` is what report.json holds and what the page is drawn from. What couldn't be measured
is null; NaN and Infinity are refused.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "Activity",
    "Comparison",
    "Conditions",
    "NoiseFloor",
    "Picture",
    "Row",
    "Settings",
    "Shot",
]

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Noun(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Settings(_Noun):
    """What every contestant was asked to do."""

    prompts: tuple[str, ...]
    prompts_source: str
    """The prompt file, or what stood in for it, in words."""
    seeds: int
    """Pictures per prompt; picture k of the whole run has seed k."""
    steps: int
    guidance: Finite
    threads: int
    """Threads of every process, the plain pipeline's too."""
    sqnr_prompts: int
    """How many prompts' trajectories the SQNR is pooled over."""


class Activity(_Noun):
    """What else the machine does, read while no contestant runs."""

    cpu_share: Finite
    """Share of all cores that was used during a second, 0..1."""
    load_average: Finite | None
    """Over the last minute, which may have held a compilation; null where the system has none."""


class Conditions(_Noun):
    """Where and with what it was measured."""

    date: datetime
    cpu: str
    isa: tuple[str, ...]
    cores: int
    ram_bytes: int
    os: str
    before: Activity
    after: Activity
    versions: dict[str, str]


class Shot(_Noun):
    """One contestant's picture for one prompt and seed."""

    file: str
    """Relative to the report, with forward slashes."""
    seconds: Finite
    psnr_db: Finite
    ssim: Finite | None
    flip: Finite | None
    lpips: Finite | None = None
    clip_score: Finite | None = None
    adherence: Finite | None = None
    """0..1, how well this picture shows its prompt."""


class Picture(_Noun):
    """The same prompt and seed by every contestant."""

    prompt: str
    seed: int
    shots: dict[str, Shot]
    """By contestant's name; the reference is among them."""


class Row(_Noun):
    """One level's figures: sizes, then speed and memory, then quality against the reference."""

    name: str
    reference: bool = False
    """Whether the others are measured against this row."""
    backend: str
    dtype: str
    """What it computes in, quantized layers aside."""
    digest: str | None = None
    bytes: int
    denoiser_bytes: int
    denoiser_fp32_bytes: int
    bytes_vs_fp32: Finite
    """denoiser_bytes / denoiser_fp32_bytes."""
    ready_seconds: Finite
    """Loading, and a first picture of two steps that isn't counted: engines open at first use."""
    seconds_per_image: Finite
    """Median over the pictures."""
    seconds_quartiles: tuple[Finite, Finite]
    speedup: Finite
    """The reference's median over this one."""
    speedup_quartiles: tuple[Finite, Finite]
    """Of the ratios picture by picture: each pair ran within seconds of each other."""
    peak_rss_bytes: int | None
    psnr_db: Finite
    """Mean over the pictures, identical ones counting as 100 dB."""
    ssim: Finite | None
    flip: Finite | None
    lpips: Finite | None = None
    """Learned distance, 0 the same; null where its network isn't on this machine."""
    clip_score: Finite | None = None
    """100 x the cosine of picture and caption; null where its network isn't on this machine."""
    sqnr_db: Finite | None
    sqnr_db_per_step: tuple[Finite, ...] = ()
    latent_cosine_per_step: tuple[Finite, ...] = ()
    """Cosine of the latents to the reference's after each step, both running freely; the mean over
    `Settings.sqnr_prompts` pictures."""
    texture: Finite | None = None
    """Power of the pictures' upper frequencies over that of the reference's: 1 keeps all texture,
    less has lost some, more has added noise."""
    banding: Finite | None = None
    """How unlike the reference's the slopes of smooth areas are, in 255ths a pixel."""
    intervals: dict[str, tuple[Finite, Finite]] = {}
    """Measure (psnr_db, ssim, flip, lpips, clip_score, adherence) -> 95 % bootstrap interval of
    its mean over the pictures."""
    adherence: Finite | None = None
    """0..1, mean over the attributes, of all pictures made."""
    adherence_attributes: dict[str, Finite] = {}
    worst: int | None = None
    """Index in `pictures` of the picture farthest from the reference, by PSNR."""


class NoiseFloor(_Noun):
    """What computing in another type loses by itself: a level below this has lost nothing more."""

    level: str
    dtype: str
    psnr_db: Finite
    ssim: Finite | None
    flip: Finite | None
    sqnr_db: Finite | None
    adherence: Finite | None


class Comparison(_Noun):
    """Everything that one run of `kiln compare` found."""

    schema_version: Literal[1] = 1
    model: str
    model_digest: str
    complete: bool
    """False when it was interrupted; the figures are then those of the pictures finished."""
    settings: Settings
    conditions: Conditions
    levels: tuple[Row, ...]
    """The reference first, then the levels as asked for."""
    noise_floor: NoiseFloor | None = None
    """The unquantized level, where it computes in another type than the reference's fp32."""
    pictures: tuple[Picture, ...]
    notes: tuple[str, ...] = ()
    """What a reader must know: what couldn't be measured and why."""

    @property
    def summary(self) -> dict[str, Any]:
        """The document without its pictures, for one line of JSON."""
        return self.model_dump(mode="json", exclude={"pictures"})
