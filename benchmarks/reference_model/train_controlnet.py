"""Train the reference model's ControlNet: `python -m benchmarks.reference_model.train_controlnet`.

It turns edges into shapes. The rest of the model stays as it is; half of the captions leave size,
shape and position open, so that the control has to decide them.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from platformdirs import user_cache_path
from torch import Tensor

from benchmarks.reference_model import autoencoder
from benchmarks.reference_model.captions import PHRASINGS, Scene, caption_of, sample_scenes
from benchmarks.reference_model.controlled import edges_of, open_caption
from benchmarks.reference_model.dataset import pictures_of
from benchmarks.reference_model.evaluate import MODEL, load_pipeline
from benchmarks.reference_model.optimising import Run, Settings, optimise, parameter_count
from benchmarks.reference_model.wording import token_ids
from profiles.hardware import detect

CONTROLNET = MODEL.with_name("controlnet")
"""The committed ControlNet."""

_SCENES_SEED = 7
_OPEN, _EMPTY = 0.6, 0.1
"""Shares of open and of empty captions; the rest say everything."""
_LAYOUT_FROM, _EARLY_SHARE = 700, 0.25
"""The last 300 of 1000 times, in which the layout is decided, get 75 % of the batch."""


@dataclass(frozen=True)
class _Set:
    """What is trained on, by scene."""

    latents: Tensor
    """Scaled, [n, 4, 16, 16]."""
    edges: NDArray[np.uint8]
    """[n, 64, 64], 0 or 255."""
    words: Tensor
    """What the text encoder makes of the captions, [n, captions, 32, width], the open one first and
    the empty one last."""


def train(run: Run, model: Path, out: Path, *, scenes: int, settings: Settings) -> None:
    """Train on so many scenes, and write the ControlNet to `out` in fp16."""
    pipeline = load_pipeline(model, run.device)
    data = _set_of(pipeline, sample_scenes(_SCENES_SEED, scenes, held_out=False), run.device)
    unet = pipeline.unet.requires_grad_(False)
    controlnet = controlnet_like(unet)
    run.log("controlnet", f"{scenes} scenes, {parameter_count([controlnet]):,} parameters")
    if run.device.type == "cpu":  # the fused kernel's backward pass is slower there
        unet.set_attn_processor(AttnProcessor())
        controlnet.set_attn_processor(AttnProcessor())
    _optimise(run, pipeline.scheduler.alphas_cumprod, unet, controlnet, data, settings)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    controlnet.half().save_pretrained(partial, safe_serialization=True)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def controlnet_like(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet with the weights of the UNet's encoding half, which adds nothing yet.

    diffusers' class has an embedding of the time twice as wide as this UNet's: what is beyond it
    starts at zero, so that the copy computes what the UNet does.
    """
    config = unet.config
    made = ControlNetModel(
        in_channels=config.in_channels,
        down_block_types=config.down_block_types,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        conditioning_embedding_out_channels=(16, 32, 64),
    )
    own, given = made.state_dict(), unet.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            if name in given:
                area = tuple(slice(0, size) for size in given[name].shape)
                tensor.zero_()[area] = given[name]
    made.load_state_dict(own)
    return made


def _set_of(pipeline: StableDiffusionPipeline, scenes: list[Scene], device: torch.device) -> _Set:
    pictures = pictures_of(scenes, first_seed=0)
    latents = autoencoder.encode(pipeline.vae, pictures, device)
    rng = np.random.default_rng(71)
    captions = [
        text
        for scene in scenes
        for text in (open_caption(scene), caption_of(scene, int(rng.integers(PHRASINGS))), "")
    ]
    ids = token_ids(pipeline.tokenizer, captions)
    parts = [ids[start : start + 300].to(device) for start in range(0, len(ids), 300)]
    words = torch.cat([_encoded(pipeline.text_encoder, part) for part in parts])
    return _Set(
        latents * pipeline.vae.config.scaling_factor,
        np.stack([edges_of(scene, seed, rng) for seed, scene in enumerate(scenes)]),
        words.reshape(len(scenes), -1, *words.shape[1:]),
    )


@torch.no_grad()
def _encoded(text_encoder: Any, ids: Tensor) -> Tensor:
    words: Tensor = text_encoder(input_ids=ids).last_hidden_state.half().cpu()
    return words


def _optimise(
    run: Run,
    kept: Tensor,
    unet: UNet2DConditionModel,
    controlnet: ControlNetModel,
    data: _Set,
    settings: Settings,
) -> None:
    """Train the ControlNet to make the UNet predict the velocity; `kept` is alpha by time."""

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([72, step])
        chosen, time = rng.integers(len(data.edges), size=settings.batch), _times(rng, settings)
        latent = data.latents[chosen].to(run.device)
        noise = torch.from_numpy(rng.standard_normal(latent.shape, np.float32)).to(run.device)
        share = rng.random(settings.batch)
        caption = np.where(share < _OPEN, 0, np.where(share < 1 - _EMPTY, 1, 2))
        words = data.words[chosen, caption].float().to(run.device)
        edges = torch.from_numpy(data.edges[chosen]).to(run.device).float() / 255
        alpha = kept[time].to(run.device)[:, None, None, None]
        noisy = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
        wanted = alpha.sqrt() * noise - (1 - alpha).sqrt() * latent
        with _products(run.device):
            shown = edges[:, None].expand(-1, 3, -1, -1)
            down, mid = controlnet(noisy, time.to(run.device), words, shown, return_dict=False)
            predicted = unet(
                noisy,
                time.to(run.device),
                words,
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
                return_dict=False,
            )[0]
        loss: Tensor = (predicted.float() - wanted).square().mean()
        return loss

    optimise(run, "controlnet", controlnet, settings, loss_at)


def _products(device: torch.device) -> torch.autocast:
    """Products in bf16, but on processors without them, where they are slower than in fp32."""
    slow = device.type == "cpu" and not detect().cpu.has_bf16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=not slow)


def _times(rng: np.random.Generator, settings: Settings) -> Tensor:
    spread = (np.arange(settings.batch) + rng.random(settings.batch)) / settings.batch
    times = np.interp(spread, (0, _EARLY_SHARE, 1), (0, _LAYOUT_FROM, 1000))
    return torch.from_numpy(times.astype(np.int64))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--work", type=Path, help="folder of checkpoints")
    parser.add_argument("--out", type=Path, default=CONTROLNET, help="folder to write")
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=16)
    given = parser.parse_args(arguments)
    work = given.work or user_cache_path("kiln") / "reference_model" / "controlnet"
    work.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        steps=given.steps,
        batch=given.batch,
        peak_rate=1e-3,
        warmup=min(50, given.steps),
        average=0.99,
        cooldown=0.6,
        checkpoint_every=200,
    )
    run = Run(work, torch.device(given.device))
    train(run, given.model, given.out, scenes=given.scenes, settings=settings)


if __name__ == "__main__":
    main()
