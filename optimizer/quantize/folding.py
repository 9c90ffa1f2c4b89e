"""Which layer's output, channel by channel, is another's input times something else.

A multiplier of the reader's input is then the producer's own: its weight's rows and bias are
multiplied, and nothing is left to do when the model runs (SmoothQuant, Xiao et al. 2023, section
4). Powers of two make that exact. What a LayerNorm gives is folded in the graph (optimizer.graph).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

__all__ = ["Producer", "gains", "producers"]


@dataclass(frozen=True)
class Producer:
    """A layer, and how many of its outputs, the first ones, the reader's input is linear in."""

    name: str
    outputs: int


def producers(root: nn.Module) -> dict[str, Producer]:
    """Reader -> producer, of attention (values -> output) and gated feed-forward parts.

    Attention mixes the values' places, never their channels; GEGLU (Shazeer 2020, "GLU Variants
    Improve Transformer") multiplies the first half of its product by a function of the other.
    """
    found: dict[str, Producer] = {}
    for name, module in root.named_modules():
        prefix = f"{name}." if name else ""
        values, out = getattr(module, "to_v", None), getattr(module, "to_out", None)
        if isinstance(values, nn.Linear) and isinstance(out, nn.ModuleList | nn.Sequential):
            found[f"{prefix}to_out.0"] = Producer(f"{prefix}to_v", values.out_features)
        if isinstance(module, FeedForward) and isinstance(module.net[0], GEGLU):
            half = module.net[0].proj.out_features // 2
            found[f"{prefix}net.2"] = Producer(f"{prefix}net.0.proj", half)
    return found


def gains(
    root: nn.Module, multipliers: Mapping[str, Tensor], fixed: frozenset[str]
) -> dict[str, tuple[str, Tensor]]:
    """Reader -> its producer and what the producer's outputs are multiplied by [out].

    Of the readers with a multiplier; a producer among `fixed` can't be changed.
    """
    found = {}
    for reader, producer in producers(root).items():
        multiplier = multipliers.get(reader)
        if multiplier is None or producer.name in fixed:
            continue
        layer = root.get_submodule(producer.name)
        assert isinstance(layer, nn.Linear)
        if multiplier.numel() != producer.outputs:
            continue
        gain = torch.ones(layer.out_features)
        gain[: producer.outputs] = multiplier.flatten()
        found[reader] = (producer.name, gain)
    return found
