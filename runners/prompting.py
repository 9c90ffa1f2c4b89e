"""Prompts of any length, with A1111's weights, as embeddings for a diffusers pipeline.

A prompt is cut into chunks of a CLIP's length less two, each with its own start and end, and the
chunks' embeddings follow each other, as many as the denoiser's signature has tokens for. A T5 reads
as much as the pipeline pads to.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from profiles.errors import UnsupportedError
from runners.embedding import Embedder
from runners.ways import way_of
from runners.weighting import plain_text

__all__ = ["PromptCache", "Prompts", "prompts_of"]

_SHOWN = 60
"""Characters of the dropped text in a sentence."""

_WORDS = {"prompt": "prompt", "negative_prompt": "negative prompt"}
_POOLED = {
    "prompt": "pooled_prompt_embeds",
    "negative_prompt": "negative_pooled_prompt_embeds",
}


@dataclass(frozen=True)
class Prompts:
    """A prompt and a negative prompt as a pipeline takes them, and what of them was cut off."""

    one: dict[str, Any]
    """The pipeline's arguments for one picture: texts, or embeddings whose first axis is 1 long."""
    facts: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def arguments(self, count: int) -> dict[str, Any]:
        """The pipeline's arguments for `count` pictures at once."""
        return {
            name: torch.cat([value] * count) if isinstance(value, Tensor) else [value] * count
            for name, value in self.one.items()
        }


_KEPT = 64
"""Pairs of prompts: FLUX's take 4 MB each."""


class PromptCache:
    """What prompts became, so that text encoders needn't stay for those that come again."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._found: OrderedDict[tuple[object, ...], Prompts] = OrderedDict()

    def of(self, key: tuple[object, ...], encode: Callable[[], Prompts]) -> Prompts:
        """What is kept for `key`, else what `encode` gives, which is kept."""
        found = self._found[key] if key in self._found else encode()
        self._found[key] = found
        self._found.move_to_end(key)
        while len(self._found) > _KEPT:
            self._found.popitem(last=False)
        return found

    def clear(self) -> None:
        """Forget all: the text encoders have changed."""
        self._found.clear()


def prompts_of(pipeline: Any, prompt: str, negative: str, *, clip_skip: int | None) -> Prompts:
    """Both prompts, encoded once for a loaded bundle: see `_encoded`."""
    loaded = getattr(pipeline, "kiln", None)
    cache, encoders = getattr(loaded, "prompts", None), getattr(loaded, "encoders", ())
    if cache is None:
        return _encoded(pipeline, prompt, negative, clip_skip)
    key = (prompt, negative, clip_skip, encoders)
    found: Prompts = cache.of(key, lambda: _encoded(pipeline, prompt, negative, clip_skip))
    return found


def _encoded(pipeline: Any, prompt: str, negative: str, clip_skip: int | None) -> Prompts:
    """Encode both prompts with the pipeline's own tokenizers and text encoders.

    `clip_skip` is a layer of the CLIPs, for both prompts, in A1111's numbers: 1 is the last and 2
    the one before, which is what SDXL and SD3 use without it (diffusers' own clip_skip counts from
    there, and leaves the negative prompt alone). An empty negative prompt is zeros where the model
    says so (`force_zeros_for_empty_prompt`), as in A1111. Pipelines of other text encoders than
    CLIP and T5 encode by themselves. Raises SpecError for a `clip_skip` beyond the layers,
    UnsupportedError for what those pipelines, FLUX or an older bundle can't do.
    """
    way = way_of(pipeline)
    if way is None:
        return _left_to_diffusers(prompt, negative, clip_skip)
    texts = {"prompt": prompt, "negative_prompt": negative}
    one: dict[str, Any] = {}
    facts, notes = {}, []
    if not way.negative:
        del texts["negative_prompt"]
        if negative.strip():
            facts["negative_prompt_dropped"] = negative
            notes.append(
                f"Warning: this model takes no negative prompt; {_quoted(negative)} is left out."
            )
    for name, found in Embedder(pipeline, way, clip_skip=clip_skip).embedded(texts).items():
        if found.dropped:
            facts[f"{name}_dropped"] = found.dropped
            notes.append(
                f"Warning: the {_WORDS[name]} is longer than the {found.room} tokens that the "
                f"bundle takes; {_quoted(found.dropped)} is left out."
            )
        zeros = name == "negative_prompt" and not negative and _forces_zeros(pipeline)
        one[f"{name}_embeds"] = torch.zeros_like(found.states) if zeros else found.states
        if found.pooled is not None:
            one[_POOLED[name]] = torch.zeros_like(found.pooled) if zeros else found.pooled
    return Prompts(one, facts, tuple(notes))


def _forces_zeros(pipeline: Any) -> bool:
    return bool(pipeline.config.get("force_zeros_for_empty_prompt", False))


def _quoted(text: str) -> str:
    return f'"{text}"' if len(text) <= _SHOWN else f'"{text[:_SHOWN]}..."'


def _left_to_diffusers(prompt: str, negative: str, clip_skip: int | None) -> Prompts:
    if clip_skip is not None and clip_skip > 1:
        raise UnsupportedError(
            f"--clip-skip {clip_skip} is for models with CLIP text encoders, which this is not: "
            "leave it out."
        )
    texts = {"prompt": plain_text(prompt), "negative_prompt": plain_text(negative)}
    for name, text in texts.items():
        if text is None:
            raise UnsupportedError(
                f"The {_WORDS[name]} holds weights, which are for models with CLIP or T5 text "
                r"encoders: take them out, or write \( and \) for brackets that are text."
            )
    return Prompts(dict(texts))
