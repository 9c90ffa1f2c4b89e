"""How pipelines embed prompts: which text encoders are asked for what. Ways are data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import CLIPTokenizer, T5Tokenizer

__all__ = ["WAYS", "Way", "way_of"]


@dataclass(frozen=True)
class Way:
    """Which text encoders a kind of pipeline asks for what; names are those of its modules."""

    hidden: tuple[str, ...] = ()
    """CLIPs whose hidden states, side by side, are the prompt's tokens."""
    pooled: tuple[str, ...] = ()
    """CLIPs whose pooled outputs, side by side, are the prompt as a whole: of its first chunk, and
    without weights, which are of tokens."""
    t5: str | None = None
    """The T5 whose tokens follow those of the CLIPs; zeros where the pipeline has none."""
    lengths: tuple[int, ...] = ()
    """Of a T5's padded prompt, in tokens: the first that holds it is used."""
    unguided: tuple[int, ...] = ()
    """`lengths` where the denoiser takes no guidance, as FLUX schnell: it was trained on 256, the
    most that diffusers' documentation allows it (its code doesn't look)."""
    normed: bool = False
    """Whether a layer's states are normed, and their mean is restored after weights; the last layer
    is the usual one then. Else that is the last but one, and other words stay as they are, which
    A1111 calls "No norm", and better for SDXL; the mean of raw states is that of few outliers."""
    negative: bool = True
    """Whether there is a negative prompt."""

    @property
    def usual_layer(self) -> int:
        """The one that is used where none is asked for, in A1111's numbers: 1 is the last."""
        return 1 if self.normed else 2


_FIRST, _SECOND, _THIRD = "text_encoder", "text_encoder_2", "text_encoder_3"

_SD3 = Way(
    hidden=(_FIRST, _SECOND), pooled=(_FIRST, _SECOND), t5=_THIRD, lengths=(256, 512)
)  # diffusers' default, and its most

WAYS: dict[tuple[str | None, ...], Way] = {
    ("clip",): Way(hidden=(_FIRST,), normed=True),
    ("clip", "clip"): Way(hidden=(_FIRST, _SECOND), pooled=(_SECOND,)),
    (None, "clip"): Way(hidden=(_SECOND,), pooled=(_SECOND,)),
    ("clip", "clip", "t5"): _SD3,
    ("clip", "clip", None): _SD3,
    ("clip", "t5"): Way(
        pooled=(_FIRST,), t5=_SECOND, lengths=(512,), unguided=(256,), negative=False
    ),
}
"""The kinds of a pipeline's text encoders, in their order (None: it has none there) -> its way."""


def way_of(pipeline: Any) -> Way | None:
    """How the pipeline embeds prompts; None where that isn't known here."""
    ends = [end for end in ("", "_2", "_3") if hasattr(pipeline, f"text_encoder{end}")]
    return WAYS.get(tuple(_kind(pipeline, end) for end in ends))


def _kind(pipeline: Any, end: str) -> str | None:
    if getattr(pipeline, f"text_encoder{end}") is None:
        return None
    tokenizer = getattr(pipeline, f"tokenizer{end}", None)
    kinds = {CLIPTokenizer: "clip", T5Tokenizer: "t5"}
    return next((kind for cls, kind in kinds.items() if isinstance(tokenizer, cls)), "unknown")
