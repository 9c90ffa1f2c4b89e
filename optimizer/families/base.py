"""What a family has to say of itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from optimizer.families.outlines import Outline
from runners.signature import Dim, Signature

__all__ = ["ComponentSpec", "Family", "FewStep", "Ranges", "Role"]

Role = Literal["text_encoder", "denoiser", "vae_encoder", "vae_decoder", "controlnet"]


@dataclass(frozen=True)
class Ranges:
    """The sizes (pixels a side) and pictures at once that a bundle is compiled for."""

    size_min: int
    size_opt: int
    size_max: int
    batch_max: int

    def side(self, step: int) -> Dim:
        """A side in pixels, in steps of so many."""
        return Dim(
            name="side", min=self.size_min, opt=self.size_opt, max=self.size_max, multiple_of=step
        )


_NOISE = (
    "beta_end",
    "beta_schedule",
    "beta_start",
    "num_train_timesteps",
    "prediction_type",
    "rescale_betas_zero_snr",
    "steps_offset",
    "trained_betas",
)
"""What a scheduler's config says of the model's noise, under the same names in every class."""


@dataclass(frozen=True)
class FewStep:
    """How a model that was distilled to few steps is drawn with."""

    steps: int
    """By default, and in recorded runs."""
    guidance: float
    """By default; up to 1 there is no classifier-free guidance, unless the denoiser takes it as an
    input."""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """diffusers' class and what it is told beside the model's noise; empty: the model's own is
    right."""

    def scheduler_config(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The scheduler's config, `own` being the model's."""
        if not self.scheduler:
            return dict(own)
        return {name: own[name] for name in _NOISE if name in own} | dict(self.scheduler)


@dataclass(frozen=True)
class ComponentSpec:
    """One compilable part of a family's pipelines."""

    name: str
    """What the bundle calls it: diffusers' folder name, the VAE in halves."""
    role: Role
    folder: str
    """The diffusers folder that holds its config and weights."""
    wrapper: str
    """How it is called: a name of runners.modules.WRAPPERS."""
    prefixes: tuple[str, ...] = ("",)
    """Beginnings of the names of its parameters; ("",) is all of the folder's."""
    fragile: tuple[str, ...] = ()
    """fnmatch patterns of layers that lose most from few bits: the first and last convolutions,
    the embeddings and the shortcuts (Q-Diffusion 2023, section 4; MixDQ 2024, section 3), and the
    last levels' FFN down-projections (a third of int8's noise on the reference model, measured with
    `kiln analyze`)."""
    factors: tuple[str, ...] = ()
    """fnmatch patterns of layers whose outputs are both factors of a matrix product: the queries
    and keys of self-attention. Not those of cross-attention: its product is a few per cent of the
    time, and OpenVINO 2026.4 gets it wrong in bf16 for few tokens (10 dB where 29 were right)."""
    optional: bool = False
    """Whether a pipeline may come without it: null in its model_index.json."""


@dataclass(frozen=True)
class Family:
    """Everything known of one model family; the only place where its name may be tested."""

    name: str
    title: str
    pipeline_classes: tuple[str, ...]
    """diffusers' classes of its models; the first one draws from text alone, others may read a
    picture too."""
    embeddings: tuple[str | None, ...]
    """What the pipeline's encode_prompt returns, by the names that its call takes; None: not
    taken."""
    components: tuple[ComponentSpec, ...]
    signatures: Callable[[Mapping[str, Mapping[str, Any]], Ranges], dict[str, Signature]]
    """Component configs and ranges -> each component's signature."""
    native_size: Callable[[Mapping[str, Mapping[str, Any]]], int]
    """Component configs -> the side in pixels that the model was trained for."""
    size_step: Callable[[Mapping[str, Mapping[str, Any]]], int]
    """Component configs -> sides must be multiples of this many pixels."""
    owns_checkpoint: Callable[[Mapping[str, tuple[int, ...]]], bool]
    """Whether a single-file checkpoint with these keys and shapes belongs to the family."""
    few_step: Callable[[Mapping[str, Mapping[str, Any]], str | None], FewStep | None]
    """Configs (the scheduler's too) and what `--few-step` names -> how it is drawn with; None for
    an ordinary model. Without a name, what the configs say by themselves."""
    outlines: Callable[[Mapping[str, Mapping[str, Any]]], dict[str, Outline]]
    """Component configs -> each component's weights and live numbers, by closed formulas."""
    text_tokens: int
    """That prompts are padded to where nothing else is asked for: what the denoiser reads."""
    few_step_kinds: tuple[str, ...] = ()
    """What `--few-step` may name."""

    def component(self, name: str) -> ComponentSpec:
        """The component called `name`; KeyError where there is none."""
        return {component.name: component for component in self.components}[name]

    def of(self, folders: Collection[str]) -> Family:
        """The family with those components whose folders are there."""
        present = tuple(spec for spec in self.components if spec.folder in folders)
        return replace(self, components=present)
