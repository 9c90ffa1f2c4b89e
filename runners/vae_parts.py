"""The halves of an AutoencoderKL in two parts each, which see tiles: before and after the middle
block's attention.

What mixes far places is that attention and group norms. A part takes its norms' statistics from
outside, and says what it saw itself: runners.seamless finds the statistics of the whole picture
with that, and attends over all of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from runners.part_names import AFTER, BEFORE

__all__ = ["DecoderAfter", "DecoderBefore", "EncoderAfter", "EncoderBefore", "part_norms"]


def part_norms(half: Any) -> dict[str, list[nn.GroupNorm]]:
    """The group norms of both parts of an AutoencoderKL's decoder or encoder, in their order."""
    first, second = half.mid_block.resnets
    before = [first, half.mid_block.attentions[0].group_norm]
    if hasattr(half, "up_blocks"):
        return {
            BEFORE: _norms(before),
            AFTER: _norms([second, *half.up_blocks, half.conv_norm_out]),
        }
    before = [*half.down_blocks, *before]
    return {BEFORE: _norms(before), AFTER: _norms([second, half.conv_norm_out])}


def _norms(blocks: list[Any]) -> list[nn.GroupNorm]:
    return [one for block in blocks for one in block.modules() if isinstance(one, nn.GroupNorm)]


class _Norms:
    """What the norms of one call take, and what they saw."""

    def __init__(self, rows: Tensor, columns: Tensor, own: Tensor, given: Tensor) -> None:
        self.rows, self.columns, self.own = rows, columns, own
        self._given = iter(given)
        self.seen: list[Tensor] = []

    def of(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance to norm [1, groups, channels, height, width] with, each [groups]."""
        mean = self._over_core(grouped)
        variance = self._over_core((grouped - mean[:, None, None, None]).square())
        self.seen.append(torch.stack((mean, variance)))
        added, factor = next(self._given)
        return self.own * mean + added, (self.own * variance + (1 - self.own)) * factor

    def _over_core(self, grouped: Tensor) -> Tensor:
        scale = grouped.shape[-2] // len(self.rows)
        rows, columns = (side.repeat_interleave(scale) for side in (self.rows, self.columns))
        found: Tensor = (grouped @ columns / columns.sum() @ rows / rows.sum()).mean(dim=(0, 2))
        return found


class _TileNorm(nn.Module):
    """A group norm whose statistics are those that `norms` gives."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.groups = (
            norm.weight,
            norm.bias,
            norm.eps,
            norm.num_groups,
        )
        self.norms: _Norms | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.norms is not None, "a tile's part sets it"
        grouped = x.reshape(1, self.groups, -1, *x.shape[2:])
        mean, variance = (each[:, None, None, None] for each in self.norms.of(grouped))
        normed = ((grouped - mean) * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


class _Tiled(nn.Module, ABC):
    """A part of a tile, then rows [height], columns [width], own [1], given [norms, 2, groups] ->
    what is made of it, seen [norms, 2, groups].

    `rows` and `columns` are in latents, 1 where statistics are seen, 0 elsewhere: numbers that 16
    bits hold. A norm's statistics are a mean and a variance a group: own 0 takes those that are
    given, own 1 what the part itself has, the mean with `given` added, the variance multiplied by
    it.
    """

    which: str
    part: str

    def __init__(self, module: nn.Module) -> None:
        """Wrap an AutoencoderKL and drop all but the part."""
        super().__init__()
        self.module: Any = module
        wanted = set(part_norms(self._half)[self.part])
        names = [name for name, layer in module.named_modules() if layer in wanted]
        self._norms = [_TileNorm(module.get_submodule(name)) for name in names]  # type: ignore[arg-type]
        for name, norm in zip(names, self._norms, strict=True):
            module.set_submodule(name, norm)
        self._drop()

    @property
    def _half(self) -> Any:
        return getattr(self.module, self.which)

    @abstractmethod
    def _drop(self) -> None:
        """Let the module hold nothing but the part."""

    def _seen(self, rows: Tensor, columns: Tensor, own: Tensor, given: Tensor) -> _Norms:
        """What the part's norms see from now on, one call long."""
        norms = _Norms(rows, columns, own, given)
        for norm in self._norms:
            norm.norms = norms
        return norms


class _Before(_Tiled):
    """x, ... -> features, query, key, value, each [1, channels, height/f, width/f], seen."""

    part = BEFORE

    def forward(
        self, x: Tensor, rows: Tensor, columns: Tensor, own: Tensor, given: Tensor
    ) -> tuple[Tensor, ...]:
        """Run one tile of one picture."""
        norms = self._seen(rows, columns, own, given)
        middle = self._half.mid_block
        features = middle.resnets[0](self._begin(x), None)
        attention = middle.attentions[0]
        tokens = attention.group_norm(features).flatten(2).transpose(1, 2)
        mixed = (
            layer(tokens).transpose(1, 2).reshape(features.shape)
            for layer in (attention.to_q, attention.to_k, attention.to_v)
        )
        return features, *mixed, torch.stack(norms.seen)

    @abstractmethod
    def _begin(self, x: Tensor) -> Tensor:
        """What the middle block is given."""


class _After(_Tiled):
    """features, attended [1, channels, height/f, width/f], ... -> what the half gives, seen."""

    part = AFTER

    def forward(
        self,
        features: Tensor,
        attended: Tensor,
        rows: Tensor,
        columns: Tensor,
        own: Tensor,
        given: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run one tile of one picture."""
        norms = self._seen(rows, columns, own, given)
        middle = self._half.mid_block
        attention = middle.attentions[0]
        added = attention.to_out[0](attended.flatten(2).transpose(1, 2))
        x = added.transpose(1, 2).reshape(features.shape) + features
        x = middle.resnets[1](x / attention.rescale_output_factor, None)
        return self._end(x), torch.stack(norms.seen)

    @abstractmethod
    def _end(self, x: Tensor) -> Tensor:
        """What the half makes of what the middle block gives."""


class DecoderBefore(_Before):
    """A tile's latent [1, channels, height, width] -> features, query, key, value, seen."""

    which = "decoder"

    def _drop(self) -> None:
        _dropped(self.module, "encoder", "quant_conv")
        _dropped(self._half, "up_blocks", "conv_norm_out", "conv_out")
        _drop_end(self._half.mid_block)

    def _begin(self, x: Tensor) -> Tensor:
        if self.module.post_quant_conv is not None:
            x = self.module.post_quant_conv(x)
        found: Tensor = self._half.conv_in(x)
        return found


class DecoderAfter(_After):
    """A tile's features, attended -> its image [1, 3, height * f, width * f], seen."""

    which = "decoder"

    def _drop(self) -> None:
        _dropped(self.module, "encoder", "quant_conv", "post_quant_conv")
        _dropped(self._half, "conv_in")
        _drop_beginning(self._half.mid_block)

    def _end(self, x: Tensor) -> Tensor:
        for block in self._half.up_blocks:
            x = block(x)
        found: Tensor = self._half.conv_out(self._half.conv_act(self._half.conv_norm_out(x)))
        return found


class EncoderBefore(_Before):
    """A tile's image [1, 3, height, width] -> features, query, key, value, seen."""

    which = "encoder"

    def _drop(self) -> None:
        _dropped(self.module, "decoder", "quant_conv", "post_quant_conv")
        _dropped(self._half, "conv_norm_out", "conv_out")
        _drop_end(self._half.mid_block)

    def _begin(self, x: Tensor) -> Tensor:
        x = self._half.conv_in(x)
        for block in self._half.down_blocks:
            x = block(x)
        return x


class EncoderAfter(_After):
    """A tile's features, attended -> its moments [1, 2 * channels, height, width], seen."""

    which = "encoder"

    def _drop(self) -> None:
        _dropped(self.module, "decoder", "post_quant_conv")
        _dropped(self._half, "conv_in", "down_blocks")
        _drop_beginning(self._half.mid_block)

    def _end(self, x: Tensor) -> Tensor:
        moments: Tensor = self._half.conv_out(self._half.conv_act(self._half.conv_norm_out(x)))
        if self.module.quant_conv is not None:
            moments = self.module.quant_conv(moments)
        return moments


def _drop_end(middle: Any) -> None:
    """What comes after the attention."""
    middle.resnets[1] = middle.attentions[0].to_out = nn.Identity()


def _drop_beginning(middle: Any) -> None:
    """What comes before the attention's last linear."""
    middle.resnets[0] = nn.Identity()
    _dropped(middle.attentions[0], "group_norm", "to_q", "to_k", "to_v")


def _dropped(module: Any, *names: str) -> None:
    for name in names:
        setattr(module, name, None)
