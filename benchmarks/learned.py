"""LPIPS and CLIP score: measures by networks whose weights lie on this machine already.

Nothing is downloaded, and a measure whose network isn't here is absent. CLIP is looked for in the
Hugging Face cache; LPIPS is the `lpips` package's (an extra), with its backbone in torch.hub's
checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.metrics import Picture

__all__ = ["CLIP_MODELS", "NO_MEASURES", "Learned", "find_learned"]

CLIP_MODELS = (
    "openai/clip-vit-large-patch14",
    "openai/clip-vit-base-patch16",
    "openai/clip-vit-base-patch32",
)
"""The first that is found is used."""

_ALEXNET = "alexnet-owt-*.pth"
_AT_ONCE = 16


@dataclass(frozen=True)
class Learned:
    """What was found; None where it wasn't."""

    lpips: Callable[[Picture, Picture], float] | None = None
    """(reference, picture) -> distance, 0 the same (Zhang et al. 2018, AlexNet, version 0.1)."""
    clip_score: Callable[[Sequence[Picture], Sequence[str]], list[float]] | None = None
    """(pictures, captions) -> 100 x max(cosine, 0) of each pair (Hessel et al. 2021)."""
    clip_model: str = ""


NO_MEASURES = Learned()


def find_learned() -> Learned:
    """The measures whose networks this machine holds."""
    score, name = _clip()
    return Learned(lpips=_lpips(), clip_score=score, clip_model=name)


def _clip() -> tuple[Callable[[Sequence[Picture], Sequence[str]], list[float]] | None, str]:
    from huggingface_hub import try_to_load_from_cache

    for name in CLIP_MODELS:
        config = try_to_load_from_cache(name, "config.json")
        weights = try_to_load_from_cache(name, "model.safetensors")
        if isinstance(config, str) and isinstance(weights, str):
            return _clip_score(Path(config).parent), name
    return None, ""


def _clip_score(folder: Path) -> Callable[[Sequence[Picture], Sequence[str]], list[float]]:
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model: Any = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)

    @torch.inference_mode()
    def score(pictures: Sequence[Picture], captions: Sequence[str]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(pictures), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            images = processor(images=list(pictures[part]), return_tensors="pt")
            texts = tokenizer(
                list(captions[part]),
                padding="max_length",
                max_length=model.config.text_config.max_position_embeddings,
                truncation=True,
                return_tensors="pt",
            )
            output = model(
                input_ids=texts.input_ids,
                attention_mask=texts.attention_mask,
                pixel_values=images.pixel_values,
            )
            cosine = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
            found += (100 * cosine.clamp_min(0)).tolist()
        return found

    return score


def _lpips() -> Callable[[Picture, Picture], float] | None:
    if find_spec("lpips") is None or find_spec("torchvision") is None:
        return None
    import torch

    if not list(Path(torch.hub.get_dir(), "checkpoints").glob(_ALEXNET)):
        return None
    import lpips

    model = lpips.LPIPS(net="alex", verbose=False)

    @torch.inference_mode()
    def distance(reference: Picture, picture: Picture) -> float:
        pair = [
            torch.from_numpy(side.astype(np.float32) / 127.5 - 1).movedim(-1, 0)[None]
            for side in (reference, picture)
        ]
        return float(model(*pair))

    return distance
