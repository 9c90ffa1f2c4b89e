"""Components' configs as they are read: what lacks or is of another type names its file and key.

Configs leave out values: transformers writes only what differs from its defaults, and old ones of
diffusers lack keys that came later. Where published models rely on a library's default for what
families read, it is filled in here; any other key that a family needs and a config lacks is an
error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from profiles.errors import SpecError

__all__ = ["DEFAULTS", "KINDS", "Config", "read_json"]

DEFAULTS: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {  # the hub's FLUX.1 has neither
        "axes_dims_rope": [16, 56, 56],
        "out_channels": None,
    },
    "clip_text_model": {
        "hidden_size": 512,
        "max_position_embeddings": 77,
        "num_hidden_layers": 12,
        "projection_dim": 512,
    },
    "t5": {"d_model": 512},
}
"""A config's `_class_name` or `model_type` -> the library's values of keys that it may lack."""


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_step_count(value: object) -> bool:
    return isinstance(value, int) and _is_whole(value) and value <= 1000


def _is_amount(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= float(str(value)) < math.inf


def _are_whole(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_whole, value))


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _counts(value: object) -> bool:
    return _is_whole(value) or _are_whole(value)


_NAME = (lambda value: isinstance(value, str), "a name")
_NAMES = (_are_names, "a list of names")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_WHOLE = (_is_whole, "a whole number of 1 or more")
_WHOLES = (_are_whole, "a list of whole numbers of 1 or more")

KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "_class_name": _NAME,
    "addition_embed_type": _NAME,
    "addition_time_embed_dim": _WHOLE,
    "architectures": _NAMES,
    "axes_dims_rope": _WHOLES,
    "block_out_channels": _WHOLES,
    "class_embed_type": _NAME,
    "conditioning_channels": _WHOLE,
    "conditioning_embedding_out_channels": _WHOLES,
    "cross_attention_dim": _WHOLE,
    "d_model": _WHOLE,
    "decoder_block_out_channels": _WHOLES,
    "down_block_types": _NAMES,
    "encoder_block_out_channels": _WHOLES,
    "encoder_hid_dim": _WHOLE,
    "global_pool_conditions": _FLAG,
    "guidance_embeds": _FLAG,
    "guidance": (_is_amount, "a number of 0 or more"),
    "hidden_size": _WHOLE,
    "in_channels": _WHOLE,
    "joint_attention_dim": _WHOLE,
    "latent_channels": _WHOLE,
    "layers_per_block": (_counts, "a whole number of 1 or more, or a list of them"),
    "max_position_embeddings": _WHOLE,
    "mid_block_add_attention": _FLAG,
    "num_class_embeds": _WHOLE,
    "num_hidden_layers": _WHOLE,
    "out_channels": _WHOLE,
    "patch_size": _WHOLE,
    "pooled_projection_dim": _WHOLE,
    "projection_class_embeddings_input_dim": _WHOLE,
    "projection_dim": _WHOLE,
    "sample_size": _WHOLE,
    "steps": (_is_step_count, "a whole number from 1 to 1000"),
    "time_cond_proj_dim": _WHOLE,
    "up_block_types": _NAMES,
    "upsampling_scaling_factor": _WHOLE,
}
"""The keys that are read before a library reads the config: whether a value is right, and what it
should be.
"""


class Config(Mapping[str, Any]):
    """A config whose missing and wrong values are a SpecError where they are read."""

    def __init__(self, document: Mapping[str, Any], path: Path) -> None:
        """Take what `path` holds, and the defaults of what it leaves out."""
        name = document.get("_class_name") or document.get("model_type")
        self._defaults = DEFAULTS.get(str(name), {})
        self._path = path
        self.document: dict[str, Any] = {**self._defaults, **document}
        """All values as they are, not checked."""

    def __iter__(self) -> Iterator[str]:
        """All keys."""
        return iter(self.document)

    def __len__(self) -> int:
        """How many keys there are."""
        return len(self.document)

    def __contains__(self, key: object) -> bool:
        """Whether there is a value, right or wrong."""
        return key in self.document

    def __getitem__(self, key: str) -> Any:
        """The value, of its kind; SpecError where it isn't there or isn't of it."""
        value = self.document.get(key)
        if value is None:
            if key in self._defaults:
                return self._defaults[key]
            raise SpecError(
                f'{self._path} has no "{key}", which kiln needs: download the model again, or add '
                "it."
            )
        fits, kind = KINDS[key]
        if fits(value):
            return value
        raise SpecError(
            f'{self._path} has {json.dumps(value)[:40]} for "{key}", which should be {kind}: '
            "download the model again, or correct it."
        )

    def get(self, key: str, default: Any = None) -> Any:
        """The value, checked, or `default` where there is none."""
        return default if self.document.get(key) is None else self[key]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a model's file; SpecError where it is damaged."""
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path} is damaged: {error}; download it again") from error
    if not isinstance(document, dict):
        raise SpecError(f"{path} is damaged: it holds no JSON object; download it again")
    return document
