"""The halves of an AutoencoderKL in two parts each: one sees the whole picture, the other tiles.

What mixes far places is the middle block's attention, which is small, and group norms. A part that
sees tiles takes its norms' statistics from outside, and says what it saw itself: runners.seamless
finds the statistics of the whole picture with that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "DecoderTile",
    "DecoderWhole",
    "EncoderTile",
    "EncoderWhole",
    "tile_norms",
]


def tile_norms(module: Any) -> list[nn.GroupNorm]:
    """The group norms of the part that sees tiles, of an AutoencoderKL with one half, in order."""
    if module.encoder is None:
        blocks = [*module.decoder.up_blocks, module.decoder.conv_norm_out]
    else:
        blocks = [*module.encoder.down_blocks]
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
    """picture's part, rows [height], columns [width], own [1], given [norms, 2, groups] -> what is
    made of it, seen [norms, 2, groups].

    `rows` and `columns` are in latents, 1 where statistics are seen, 0 elsewhere: numbers that 16
    bits hold. A norm's statistics are a mean and a variance a group: own 0 takes those that are
    given, own 1 what the part itself has, the mean with `given` added, the variance multiplied by
    it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module: Any = module
        self._drop()
        wanted = set(tile_norms(module))
        names = [name for name, layer in module.named_modules() if layer in wanted]
        self._norms = [_TileNorm(module.get_submodule(name)) for name in names]  # type: ignore[arg-type]
        for name, norm in zip(names, self._norms, strict=True):
            module.set_submodule(name, norm)

    @abstractmethod
    def _drop(self) -> None:
        """Let the module hold nothing but the part."""

    @abstractmethod
    def _run(self, x: Tensor) -> Tensor:
        """The part, of a tile."""

    def forward(
        self, x: Tensor, rows: Tensor, columns: Tensor, own: Tensor, given: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run one tile of one picture."""
        norms = _Norms(rows, columns, own, given)
        for norm in self._norms:
            norm.norms = norms
        return self._run(x), torch.stack(norms.seen)


class DecoderTile(_Tiled):
    """A tile's features [1, channels, height, width] -> its image [1, 3, height * f, width * f]."""

    def _drop(self) -> None:
        _dropped(self.module, "encoder", "quant_conv", "post_quant_conv")
        _dropped(self.module.decoder, "conv_in", "mid_block")

    def _run(self, x: Tensor) -> Tensor:
        decoder = self.module.decoder
        for block in decoder.up_blocks:
            x = block(x)
        found: Tensor = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x)))
        return found


class DecoderWhole(nn.Module):
    """latent [batch, channels, height, width] -> features [batch, channels, height, width]."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap an AutoencoderKL and drop all but its decoder's beginning."""
        super().__init__()
        self.module: Any = module
        _dropped(module, "encoder", "quant_conv")
        _dropped(self.module.decoder, "up_blocks", "conv_norm_out", "conv_out")

    def forward(self, latent: Tensor) -> tuple[Tensor]:
        """Decode up to the middle."""
        if self.module.post_quant_conv is not None:
            latent = self.module.post_quant_conv(latent)
        decoder = self.module.decoder
        return (decoder.mid_block(decoder.conv_in(latent)),)


class EncoderTile(_Tiled):
    """A tile's image [1, 3, height * f, width * f] -> its features [1, channels, height, width]."""

    def _drop(self) -> None:
        _dropped(self.module, "decoder", "quant_conv", "post_quant_conv")
        _dropped(self.module.encoder, "mid_block", "conv_norm_out", "conv_out")

    def _run(self, x: Tensor) -> Tensor:
        encoder = self.module.encoder
        x = encoder.conv_in(x)
        for block in encoder.down_blocks:
            x = block(x)
        return x


class EncoderWhole(nn.Module):
    """features [batch, channels, height, width] -> moments [batch, 2*channels, height, width]."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap an AutoencoderKL and drop all but its encoder's end."""
        super().__init__()
        self.module: Any = module
        _dropped(module, "decoder", "post_quant_conv")
        _dropped(self.module.encoder, "conv_in", "down_blocks")

    def forward(self, features: Tensor) -> tuple[Tensor]:
        """Encode from the middle on."""
        encoder = self.module.encoder
        moments = encoder.mid_block(features)
        moments = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(moments)))
        if self.module.quant_conv is not None:
            moments = self.module.quant_conv(moments)
        return (moments,)


def _dropped(module: Any, *names: str) -> None:
    for name in names:
        setattr(module, name, None)
