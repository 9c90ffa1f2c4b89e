"""Prompts -> what a pipeline takes in their place: tokens' embeddings, and those of the whole.

In chunks as many as the denoiser's signature has tokens for, with weights, and for plain prompts
that fit the very numbers of diffusers' own encode_prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from profiles.errors import SpecError, UnsupportedError
from runners.signature import Dim, Signature
from runners.tokens import ClipTokens, T5Tokens, Weighted
from runners.ways import Way
from runners.weighting import weighted

__all__ = ["Embedded", "Embedder"]


@dataclass(frozen=True)
class Embedded:
    """One prompt as a pipeline takes it."""

    states: Tensor
    """[1, tokens, width]"""
    pooled: Tensor | None
    """[1, width], where the pipeline takes one."""
    dropped: str
    """The text that didn't fit."""
    room: int
    """The tokens that would have."""


@dataclass(frozen=True)
class _Read:
    """One prompt's tokens for every encoder, by its name."""

    clips: dict[str, ClipTokens]
    t5: T5Tokens | None

    @property
    def chunks(self) -> int:
        return max(len(clip.chunks) for clip in self.clips.values())

    @property
    def length(self) -> int:
        return self.t5.needed if self.t5 else 0

    def fit(self, chunks: int, length: int) -> tuple[str, int]:
        """Cut it to so many; the text that no encoder reads then, and the tokens of the one that
        reads most.
        """
        cut = [clip.fit(chunks) for clip in self.clips.values()]
        if self.t5 is not None:
            return self.t5.fit(length), length - 1
        return cut[0], chunks * next(iter(self.clips.values())).room


@final
class Embedder:
    """A pipeline's text encoders, asked in its way; the same question once."""

    def __init__(self, pipeline: Any, way: Way, *, clip_skip: int | None) -> None:
        """Take the layer in A1111's numbers: 1 is the last, 2 the one before.

        Raises SpecError where there are fewer layers, UnsupportedError where none is read.
        """
        self._pipeline, self._way = pipeline, way
        if clip_skip is not None:
            _check_clip_skip(pipeline, way, clip_skip)
        self._layer = clip_skip or way.usual_layer
        self._t5 = getattr(pipeline, way.t5, None) if way.t5 else None
        self._outputs: dict[tuple[str, tuple[int, ...]], Any] = {}

    @torch.no_grad()
    def embedded(self, prompts: Mapping[str, str]) -> dict[str, Embedded]:
        """All prompts, by their names, in as many tokens each: those that the longest needs, or
        the most that the denoiser takes.
        """
        read = {name: self._read(prompt) for name, prompt in prompts.items()}
        length = self._length(max(found.length for found in read.values()))
        chunks = self._chunks(max(found.chunks for found in read.values()), length)
        fits = {name: found.fit(chunks, length) for name, found in read.items()}
        self._ask_in_turn(list(read.values()), chunks)
        return {
            name: self._embedded(found, chunks, length, fits[name]) for name, found in read.items()
        }

    def _ask_in_turn(self, read: list[_Read], chunks: int) -> None:
        """Everything that is asked of one CLIP before the next is opened."""
        for name in dict.fromkeys((*self._way.hidden, *self._way.pooled)):
            for one in read:
                for index in range(chunks if name in self._way.hidden else 1):
                    self._output(name, one.clips[name].padded(index)[0])

    def _read(self, prompt: str) -> _Read:
        pieces = weighted(prompt)
        names = dict.fromkeys((*self._way.hidden, *self._way.pooled))
        clips = {name: ClipTokens(self._tokenizer(name), pieces) for name in names}
        t5 = None if self._t5 is None else T5Tokens(self._tokenizer(self._way.t5), pieces)
        return _Read(clips, t5)

    def _tokenizer(self, encoder: str | None) -> Any:
        return getattr(self._pipeline, str(encoder).replace("text_encoder", "tokenizer"))

    def _embedded(self, read: _Read, chunks: int, length: int, fit: tuple[str, int]) -> Embedded:
        dropped, room = fit
        parts = [self._chunk(read, index) for index in range(chunks) if self._way.hidden]
        if self._t5 is not None and read.t5 is not None:
            ids, weights = read.t5.padded(length)
            given = torch.tensor([ids], device=self._pipeline._execution_device)
            parts.append(_scaled(self._t5(given)[0], weights))
        elif length:
            width = int(self._pipeline.transformer.config.joint_attention_dim)
            parts.append(parts[0].new_zeros(1, length, width))
        widest = max(part.shape[-1] for part in parts)
        states = torch.cat([pad(part, (0, widest - part.shape[-1])) for part in parts], dim=1)
        pooled = [self._pooled(name, read.clips[name].padded(0)) for name in self._way.pooled]
        return Embedded(states, torch.cat(pooled, dim=-1) if pooled else None, dropped, room)

    def _chunk(self, read: _Read, index: int) -> Tensor:
        """One chunk's [1, tokens, width], of all CLIPs side by side."""
        scaled = []
        for name in self._way.hidden:
            ids, weights = read.clips[name].padded(index)
            states = self._states(name, ids)
            if self._way.normed:
                scaled.append(_with_mean(_scaled(states, weights), states))
            else:
                scaled.append(_scaled(states, weights))
        return torch.cat(scaled, dim=-1)

    def _states(self, name: str, ids: list[int]) -> Tensor:
        """The layer's, [1, tokens, width]."""
        if self._way.normed and self._layer == 1:
            last: Tensor = self._output(name, ids).last_hidden_state
            return last
        states: Tensor = self._output(name, ids).hidden_states[-self._layer]
        if self._way.normed:
            encoder = getattr(self._pipeline, name)
            states = getattr(encoder, "text_model", encoder).final_layer_norm(states)
        return states

    def _pooled(self, name: str, weighted_ids: Weighted) -> Tensor:
        """The projected one [1, width] of a CLIP that has a projection."""
        output = self._output(name, weighted_ids[0])
        projected: Tensor | None = getattr(output, "text_embeds", None)
        pooled: Tensor = output.pooler_output if projected is None else projected
        return pooled

    def _output(self, name: str, ids: list[int]) -> Any:
        key = (name, tuple(ids))
        if key not in self._outputs:
            given = torch.tensor([ids], device=self._pipeline._execution_device)
            # engines of models that optimum exported give the last layer only
            plain = name not in self._way.hidden or (self._way.normed and self._layer == 1)
            encoder = getattr(self._pipeline, name)
            self._outputs[key] = encoder(given, output_hidden_states=not plain)
        return self._outputs[key]

    def _length(self, needed: int) -> int:
        """Tokens of the T5, or of the zeros in its place."""
        way = self._way
        if self._t5 is None:
            return way.lengths[0] if way.t5 else 0
        unguided = bool(way.unguided) and not self._pipeline.transformer.config.guidance_embeds
        lengths = way.unguided if unguided else way.lengths
        return self._fewest({length: self._chunk_length + length for length in lengths}, needed)

    def _chunks(self, needed: int, length: int) -> int:
        """One beside a T5, which reads all of the prompt anyway."""
        if self._t5 is not None:
            return 1
        most = max(1, (self._axis.max - length) // self._chunk_length)
        sizes = {count: count * self._chunk_length + length for count in range(1, most + 1)}
        return self._fewest(sizes, needed)

    @property
    def _chunk_length(self) -> int:
        """Of the denoiser's tokens that a chunk becomes: none where CLIPs are pooled only."""
        return max((self._tokenizer(name).model_max_length for name in self._way.hidden), default=0)

    @cached_property
    def _axis(self) -> Dim:
        """The text tokens that the denoiser takes."""
        signature: Signature = self._pipeline.kiln.manifest.component("denoiser").signature
        axes = next(s.axes for s in signature.inputs if s.name == "encoder_hidden_states")
        if isinstance(axes[1], str):
            return signature.dim(axes[1])
        return Dim(name="tokens", min=axes[1], opt=axes[1], max=axes[1])

    def _fewest(self, sizes: Mapping[int, int], needed: int) -> int:
        """Of sizes, and what they are in the denoiser's tokens: the smallest legal one that is as
        large as `needed`, else the largest legal one.
        """
        legal = [size for size, tokens in sizes.items() if self._axis.legal(tokens)]
        enough = [size for size in legal if size >= needed]
        return (enough or legal[-1:] or list(sizes))[0]


def _check_clip_skip(pipeline: Any, way: Way, clip_skip: int) -> None:
    if not way.hidden and clip_skip > 1:
        raise UnsupportedError(
            f"--clip-skip {clip_skip} is for models that read the layers of a CLIP, and this one "
            "takes its pooled output only: leave it out."
        )
    encoders = [getattr(pipeline, name) for name in way.hidden]
    layers = min((encoder.config.num_hidden_layers for encoder in encoders), default=1)
    if clip_skip > layers:
        raise SpecError(
            f"--clip-skip {clip_skip} is more than the text encoder's {layers} layers: use 1 to "
            f"{layers}."
        )


def _scaled(states: Tensor, weights: list[float]) -> Tensor:
    """Each token's embedding times its weight."""
    if all(weight == 1.0 for weight in weights):
        return states
    return states * torch.tensor(weights, device=states.device, dtype=states.dtype)[None, :, None]


_LEAST_MEAN = 1e-3
"""In standard deviations: a mean below it is rounding, and a ratio of such means is noise."""


def _with_mean(scaled: Tensor, states: Tensor) -> Tensor:
    """The chunk with the mean that it had before weights, as A1111 does."""
    mean, new_mean = states.mean(), scaled.mean()
    least = _LEAST_MEAN * states.std()
    if scaled is states or abs(mean) <= least or abs(new_mean) <= least:
        return scaled
    return scaled * (mean / new_mean)
