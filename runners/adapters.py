"""Engines in the place of a diffusers pipeline's modules: what all adapters share, text encoders,
the VAE. Denoisers have a file of their own (runners.denoisers).

An adapter has what the pipelines read of a module (config, dtype, device, one parameter) and calls
an engine; everything else (schedulers, guidance, callbacks, img2img) stays diffusers' own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from transformers import CLIPTextConfig, T5Config
from transformers.utils import ModelOutput

from profiles.errors import UnsupportedError
from runners.engines.base import DeviceEngine, Engine
from runners.modules import component_class
from runners.part_names import AFTER, BEFORE
from runners.seamless import (
    Grid,
    Held,
    Made,
    Picture,
    Result,
    Stored,
    in_seamless_tiles,
    margins_of,
)
from runners.spilled import Spilled
from runners.streamed_attention import attend
from runners.tiling import in_tiles

__all__ = ["Adapter", "OpenEngine", "TextEncoderAdapter", "VaeAdapter", "run", "with_defaults"]

OpenEngine = Callable[..., Engine]
"""Gives the open engine, or with a form's name that form of it."""


class Adapter(nn.Module):
    """The module-shaped surface that all roles share; numbers enter and leave as float32."""

    def __init__(self, config: Any) -> None:
        """Take the config that pipelines read."""
        super().__init__()
        self.config = config
        self.anchor = nn.Parameter(torch.zeros(0), requires_grad=False)
        self.low_rank: Mapping[str, Any] = {}
        """What the engine holds of the LoRAs in use (never changed); empty: the plain one runs."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs and outputs; what the engine computes in is the manifest's."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs live."""
        return self.anchor.device

    def opened(self, engine: OpenEngine, form: str = "") -> Engine:
        """The engine, in the form that takes what it is fed with, and holding the LoRAs."""
        forms = [name for name in (form, "lora" if self.low_rank else "") if name]
        found = engine("+".join(forms)) if forms else engine()
        if self.low_rank and found.held is not self.low_rank:
            found.hold(self.low_rank)
        return found


def with_defaults(config: Mapping[str, Any]) -> FrozenDict:
    """The config, and its diffusers class's values for what it leaves out.

    Pipelines read keys that configs of older diffusers lack, as those of Stable Diffusion 1.5 do:
    the VAE's scaling_factor (diffusers#1860), the UNet's time_cond_proj_dim.
    """
    if "_class_name" not in config:
        return FrozenDict(config)
    parameters = inspect.signature(component_class(config).__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return FrozenDict({**defaults, **config})


def run(engine: Engine, **feeds: Tensor) -> list[Tensor]:
    """Call the engine with the signature's dtypes; outputs in the signature's order.

    What the engine holds isn't given again.
    """
    if isinstance(engine, DeviceEngine):
        types = {spec.name: getattr(torch, spec.dtype) for spec in engine.signature.inputs}
        given = {name: x.detach().to("cuda", types[name]) for name, x in feeds.items()}
        found = engine.on_device(given)
        return [found[spec.name] for spec in engine.signature.outputs]
    specs = {spec.name: np.dtype(spec.dtype) for spec in engine.signature.inputs}
    arrays = {
        name: tensor.detach().cpu().numpy().astype(specs[name], copy=False)
        for name, tensor in feeds.items()
    }
    outputs = engine(arrays)
    return [torch.from_numpy(outputs[spec.name]) for spec in engine.signature.outputs]


class TextEncoderAdapter(Adapter):
    """Stands for a text encoder of transformers: CLIP, with a projection or without, or T5."""

    def __init__(self, config: dict[str, Any], engine: OpenEngine) -> None:
        """Take the text encoder's config and a function that opens its engine once."""
        kind = T5Config if config.get("model_type") == "t5" else CLIPTextConfig
        super().__init__(kind.from_dict(config))
        self._engine = engine
        # where diffusers norms an earlier layer's states: these engines give normed ones
        self.text_model = SimpleNamespace(final_layer_norm=nn.Identity())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,  # noqa: FBT001 (transformers' signature)
        return_dict: bool | None = None,  # noqa: FBT001, ARG002 (transformers' signature)
    ) -> ModelOutput:
        """Encode [batch, tokens] ids; what comes back is what transformers' class gives.

        Raises UnsupportedError for what the engine has no input or output for.
        """
        if attention_mask is not None:
            raise UnsupportedError("The text encoder's engine takes no attention mask.")
        engine = self.opened(self._engine)
        names = [spec.name for spec in engine.signature.outputs]
        outputs = run(engine, input_ids=input_ids)
        found: dict[str, Any] = dict(zip(names, outputs, strict=True))
        states = found.pop("hidden_states", None)
        if output_hidden_states:
            if states is None:
                raise UnsupportedError(
                    "The text encoder's engine gives the last hidden state only: compile the model "
                    "again, from its own weights."
                )
            found["hidden_states"] = states.unbind(1)
        return _TextOutput(**found)


@dataclass
class _TextOutput(ModelOutput):  # type: ignore[misc]
    """Tensors by name and, as transformers' own, by place: those that are there, in this order."""

    text_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class VaeAdapter(Adapter):
    """Stands for an AutoencoderKL or an AutoencoderTiny; its halves are two engines."""

    def __init__(
        self,
        config: dict[str, Any],
        *,
        encoder: OpenEngine,
        decoder: OpenEngine,
        tile_side: int | None = None,
        seamless: bool = False,
    ) -> None:
        """Take the VAE's config and functions that open its engines once.

        `tile_side`: pixels of a tile's side, where larger pictures are to be coded in tiles;
        `seamless`: whether the engines have the forms for tiles that give what the whole picture
        does (runners.seamless), else tiles are blended (runners.tiling).
        """
        super().__init__(with_defaults(config))
        self._encoder, self._decoder = encoder, decoder
        self._tile_side, self.use_tiling, self._seamless = tile_side, False, seamless
        self._encoded_as = _ENCODED.get(str(config.get("_class_name")), _distributed)

    def enable_tiling(self) -> None:
        """Code pictures larger than a tile in tiles: the memory that it takes stops growing.

        Raises UnsupportedError where the tile's side isn't known.
        """
        if self._tile_side is None:
            raise UnsupportedError("This VAE has no size of tiles: load it from a bundle.")
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Code every picture as a whole again."""
        self.use_tiling = False

    def encode(
        self,
        x: Tensor,
        return_dict: bool = True,  # noqa: FBT001, FBT002 (diffusers' signature)
    ) -> BaseOutput | tuple[Any]:
        """Images in -1..1 [batch, 3, height, width] -> what the class gives: an AutoencoderKL the
        latents' distribution, an AutoencoderTiny the latents.
        """
        found = self._encoded_as(self._encode(x))
        return found if return_dict else found.to_tuple()

    def _encode(self, x: Tensor) -> Tensor:
        """What the encoder's wrapper gives."""
        if self._in_parts(x, pixels=1):
            margins = margins_of(self.config, encodes=True)
            return self._seamlessly(self._encoder, x, margins, (self._factor, 1))
        return self._called(self._encoder(), "image", x, pixels=1)

    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,  # noqa: FBT001, FBT002 (diffusers' signature)
        generator: torch.Generator | None = None,  # noqa: ARG002 (diffusers' signature)
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents already divided by scaling_factor -> images in -1..1."""
        if self._in_parts(z, pixels=self._factor):
            margins = margins_of(self.config, encodes=False)
            image = self._seamlessly(self._decoder, z, margins, (1, self._factor))
        else:
            image = self._called(self._decoder(), "latent", z, pixels=self._factor)
        return DecoderOutput(sample=image) if return_dict else (image,)

    @property
    def _factor(self) -> int:
        """Pixels of a latent's side."""
        return int(2 ** (len(self.config.block_out_channels) - 1))

    def _in_parts(self, x: Tensor, *, pixels: int) -> bool:
        """Whether `x`, a place of which has so many pixels a side, is coded in seamless tiles."""
        if not (self.use_tiling and self._seamless and self._tile_side is not None):
            return False
        return max(x.shape[-2:]) * pixels > self._tile_side

    def _seamlessly(
        self, half: OpenEngine, x: Tensor, margins: tuple[int, int], units: tuple[int, int]
    ) -> Tensor:
        """What a half makes of pictures, or of their latents, in tiles: its part before the
        attention for all of them, then the one after it. `units`: places a latent before and after.
        """
        latents = (x.shape[-2] // units[0], x.shape[-1] // units[0])
        with ExitStack() as stack:
            part, pairs, found = half(BEFORE), [], []
            channels = [int(spec.axes[1]) for spec in part.signature.outputs[:-1]]
            for one in torch.split(x, 1):
                maps = [stack.enter_context(closing(Spilled(*latents, n))) for n in channels]
                self._tiled(part, Held(one), margins[0], units[0], Stored(*maps))
                features, query, key, value = maps
                attend(query, key, value)
                pairs.append((features, query))
            part = half(AFTER)
            for pair in pairs:
                made = Made(latents, units[1])
                self._tiled(part, Stored(*pair), margins[1], 1, made)
                found.append(made.tensor)
        return torch.cat(found) if len(found) > 1 else found[0]

    def _tiled(
        self, part: Engine, picture: Picture, margin: int, unit: int, result: Result
    ) -> None:
        """One picture through a part of a half, `unit` places a latent."""
        *first, _, _, _, statistics = part.signature.inputs
        assert self._tile_side is not None, "was asked before"
        side = self._tile_side * unit // self._factor
        height, width = (part.signature.dim(d).nearest(side) for d in _SIDES)

        def one(tile: Any, rows: Tensor, columns: Tensor, own: Tensor, given: Tensor) -> Any:
            feeds = {spec.name: each for spec, each in zip(first, tile, strict=True)}
            beside = {"rows": rows, "columns": columns, "own": own, "given": given}
            *made, seen = run(part, **feeds, **beside)
            return tuple(made), seen

        norms = tuple(int(axis) for axis in statistics.axes)
        in_seamless_tiles(one, picture, Grid((height, width), unit, margin), norms, result)

    def _called(self, engine: Engine, name: str, x: Tensor, *, pixels: int) -> Tensor:
        """The engine's only output, in tiles where those are wanted and `x` is larger than one.

        `pixels` are those of the side of one of its places.
        """

        def whole(part: Tensor) -> Tensor:
            (found,) = run(engine, **{name: part})
            return found

        if not self.use_tiling or self._tile_side is None:
            return whole(x)
        tile = tuple(engine.signature.dim(d).nearest(self._tile_side // pixels) for d in _SIDES)
        if x.shape[-2] <= tile[0] and x.shape[-1] <= tile[1]:
            return whole(x)
        return in_tiles(whole, x, (tile[0], tile[1]), unit=self._factor // pixels)


_SIDES = ("height", "width")


def _distributed(moments: Tensor) -> BaseOutput:
    return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))


def _plain(latents: Tensor) -> BaseOutput:
    return AutoencoderTinyOutput(latents=latents)


_ENCODED: dict[str, Callable[[Tensor], BaseOutput]] = {"AutoencoderTiny": _plain}
"""How classes give what their encoder gave, where it isn't a distribution."""
