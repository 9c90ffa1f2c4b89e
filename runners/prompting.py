"""Prompts of any length, with A1111's weights, as embeddings for a diffusers pipeline.

A prompt is cut into chunks of the text encoder's length less two, each with its own start and end,
and the chunks' embeddings follow each other, as many as the denoiser's signature has tokens for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from profiles.errors import SpecError, UnsupportedError
from runners.signature import Signature
from runners.weighting import Piece, plain_text, weighted

__all__ = ["Prompts", "prompts_of"]

_SHOWN = 60
"""Characters of the dropped text in a sentence."""


@dataclass(frozen=True)
class Prompts:
    """A prompt and a negative prompt as a pipeline takes them, and what of them was cut off."""

    one: dict[str, Any]
    """The pipeline's arguments for one picture: texts, or embeddings [1, tokens, width]."""
    facts: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def arguments(self, count: int) -> dict[str, Any]:
        """The pipeline's arguments for `count` pictures at once."""
        return {
            name: value.repeat(count, 1, 1) if isinstance(value, Tensor) else [value] * count
            for name, value in self.one.items()
        }


def prompts_of(pipeline: Any, prompt: str, negative: str, *, clip_skip: int | None) -> Prompts:
    """Encode both prompts with the pipeline's own tokenizer and text encoder.

    `clip_skip` 1 is the last layer and 2 the one before, of both prompts, as in A1111; diffusers'
    own clip_skip counts from 0 and leaves the negative prompt alone. Pipelines with several text
    encoders, or other ones than CLIP, encode by themselves. Raises SpecError for a `clip_skip`
    beyond the layers, UnsupportedError for what those pipelines or an older bundle can't do.
    """
    tokenizer = getattr(pipeline, "tokenizer", None)
    if not isinstance(tokenizer, CLIPTokenizer) or hasattr(pipeline, "text_encoder_2"):
        return _left_to_diffusers(prompt, negative, clip_skip)
    _check_clip_skip(pipeline, clip_skip)
    tokens = {"prompt": _Tokens(pipeline, prompt), "negative_prompt": _Tokens(pipeline, negative)}
    needed = max(len(found.chunks) for found in tokens.values())
    count = _legal_count(pipeline, needed)
    one, facts, notes = {}, {}, []
    for name, found in tokens.items():
        dropped = found.fit(count)
        if dropped:
            facts[f"{name}_dropped"] = dropped
            notes.append(_note(name, dropped, count * found.room))
        embeds = [_embedded(pipeline, found, i, clip_skip) for i in range(count)]
        one[f"{name}_embeds"] = torch.cat(embeds, dim=1)
    return Prompts(one, facts, tuple(notes))


def _left_to_diffusers(prompt: str, negative: str, clip_skip: int | None) -> Prompts:
    if clip_skip is not None and clip_skip > 1:
        raise UnsupportedError(
            f"--clip-skip {clip_skip} is for models with one CLIP text encoder, which this is not: "
            "leave it out."
        )
    texts = {"prompt": plain_text(prompt), "negative_prompt": plain_text(negative)}
    for name, text in texts.items():
        if text is None:
            raise UnsupportedError(
                f"The {_WORDS[name]} holds weights, which are for models with one CLIP text "
                r"encoder: take them out, or write \( and \) for brackets that are text."
            )
    return Prompts(dict(texts))


_WORDS = {"prompt": "prompt", "negative_prompt": "negative prompt"}


def _note(name: str, dropped: str, room: int) -> str:
    shown = dropped if len(dropped) <= _SHOWN else f"{dropped[:_SHOWN]}..."
    return (
        f'Warning: the {_WORDS[name]} is longer than the {room} tokens that the bundle takes; "'
        f'{shown}" is left out.'
    )


def _check_clip_skip(pipeline: Any, clip_skip: int | None) -> None:
    layers = pipeline.text_encoder.config.num_hidden_layers
    if clip_skip is not None and clip_skip > layers:
        raise SpecError(
            f"--clip-skip {clip_skip} is more than the text encoder's {layers} layers: use 1 to "
            f"{layers}."
        )


class _Tokens:
    """A prompt's token ids and their weights, in chunks of what an encoder takes less two."""

    def __init__(self, pipeline: Any, prompt: str) -> None:
        self.tokenizer = pipeline.tokenizer
        self.length: int = self.tokenizer.model_max_length
        self.room = self.length - 2
        every = _ids(self.tokenizer, weighted(prompt))
        starts = range(0, max(1, len(every)), self.room)
        self.chunks = [every[start : start + self.room] for start in starts]

    def fit(self, count: int) -> str:
        """Have exactly `count` chunks; the text of those that are dropped."""
        dropped = [token for chunk in self.chunks[count:] for token, _ in chunk]
        self.chunks = self.chunks[:count] + [[]] * (count - len(self.chunks))
        return str(self.tokenizer.decode(dropped)).strip() if dropped else ""

    def padded(self, index: int) -> tuple[list[int], list[float]]:
        """A chunk's ids with start, end and padding, and their weights."""
        chunk = self.chunks[index]
        ids = [self.tokenizer.bos_token_id, *(token for token, _ in chunk)]
        ids.append(self.tokenizer.eos_token_id)
        weights = [1.0, *(weight for _, weight in chunk)]
        ids += [self.tokenizer.pad_token_id] * (self.length - len(ids))
        return ids, weights + [1.0] * (self.length - len(weights))


def _ids(tokenizer: Any, pieces: Sequence[Piece]) -> list[tuple[int, float]]:
    return [
        (token, piece.weight)
        for piece in pieces
        for token in tokenizer(piece.text, add_special_tokens=False, verbose=False).input_ids
    ]


def _legal_count(pipeline: Any, needed: int) -> int:
    """The fewest chunks that hold `needed` and that the denoiser takes, else the most it takes."""
    signature: Signature = pipeline.kiln.manifest.component("denoiser").signature
    length = int(pipeline.tokenizer.model_max_length)
    axes = next(s.axes for s in signature.inputs if s.name == "encoder_hidden_states")
    if isinstance(axes[1], int):
        return max(1, axes[1] // length)
    tokens = signature.dim(axes[1])
    legal = [n for n in range(1, tokens.max // length + 1) if tokens.legal(n * length)]
    return next((n for n in legal if n >= needed), legal[-1] if legal else 1)


@torch.no_grad()
def _embedded(pipeline: Any, tokens: _Tokens, index: int, clip_skip: int | None) -> Tensor:
    """One chunk's embeddings [1, tokens, width]."""
    ids, weights = tokens.padded(index)
    encoder = pipeline.text_encoder
    given = torch.tensor([ids], device=pipeline._execution_device)
    if clip_skip is None or clip_skip == 1:
        states: Tensor = encoder(given)[0]
    else:
        every = encoder(given, output_hidden_states=True).hidden_states
        states = encoder.text_model.final_layer_norm(every[-clip_skip])
    if all(weight == 1.0 for weight in weights):
        return states
    return _scaled(states, torch.tensor(weights, device=states.device))


_LEAST_MEAN = 1e-3
"""In standard deviations: a mean below it is rounding, and a ratio of such means is noise."""


def _scaled(states: Tensor, weights: Tensor) -> Tensor:
    """Each token's embedding times its weight, the chunk's mean restored as A1111 does."""
    scaled = states * weights[None, :, None]
    mean, new_mean = states.mean(), scaled.mean()
    least = _LEAST_MEAN * states.std()
    if abs(mean) > least and abs(new_mean) > least:
        scaled = scaled * (mean / new_mean)
    return scaled
