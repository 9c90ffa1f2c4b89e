"""Train the reference model's LoRA, greys: `python -m benchmarks.reference_model.train_lora`.

Denoiser and text encoder get low-rank parts beside their attention. The LoRA learns from the same
drawn pictures, their colours taken away; minutes on two cores. Then it says how colourful pictures
are with it and without.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.reference_model import autoencoder
from benchmarks.reference_model.captions import PHRASINGS, caption_of
from benchmarks.reference_model.dataset import pictures_of, training_scenes
from benchmarks.reference_model.evaluate import MODEL, captions_of, generate, load_pipeline
from benchmarks.reference_model.exporting import GUIDANCE, STEPS
from benchmarks.reference_model.wording import token_ids

__all__ = ["LORA", "colourfulness", "greys", "train_lora"]

LORA = Path(__file__).with_name("loras") / "greys.safetensors"
"""The committed LoRA."""

_RANK = 4
_SCENES = 800
_STEPS = 300
_BATCH = 8
_RATE = 2e-3
_SEED = 5
_DENOISER = ["to_q", "to_k", "to_v", "to_out.0"]
_TEXT = ["q_proj", "v_proj"]


def greys(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The pictures [n, height, width, 3] without their colours (luma of ITU-R BT.601)."""
    luma = pictures @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.repeat((luma + 0.5).astype(np.uint8)[..., None], 3, axis=3)


def colourfulness(images: Sequence[Image.Image]) -> float:
    """How far the largest of a pixel's three values is from the smallest, 0..255, on average."""
    pixels = np.stack([np.asarray(image.convert("RGB"), np.float32) for image in images])
    return float((pixels.max(-1) - pixels.min(-1)).mean())


def train_lora(pipeline: StableDiffusionPipeline, steps: int, scenes: int) -> list[float]:
    """Add low-rank parts to the pipeline's denoiser and text encoder and train them; the losses."""
    torch.manual_seed(_SEED)
    device = torch.device("cpu")
    drawn = training_scenes(scenes)
    latents = autoencoder.encode(pipeline.vae, greys(pictures_of(drawn, 0)), device)
    latents = latents * pipeline.vae.config.scaling_factor
    captions = [caption_of(scene, i % PHRASINGS) for i, scene in enumerate(drawn)]
    ids = token_ids(pipeline.tokenizer, captions)
    for module, names in ((pipeline.unet, _DENOISER), (pipeline.text_encoder, _TEXT)):
        module.requires_grad_(False)
        module.add_adapter(LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=names))
    trained = [
        parameter
        for module in (pipeline.unet, pipeline.text_encoder)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    optimizer = torch.optim.AdamW(trained, lr=_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(latents), (_BATCH,))
        loss = _loss(pipeline, latents[chosen], ids[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def _loss(pipeline: StableDiffusionPipeline, latents: Tensor, ids: Tensor) -> Tensor:
    """The error of v at times drawn evenly."""
    kept = pipeline.scheduler.alphas_cumprod
    times = ((torch.arange(len(latents)) + torch.rand(len(latents))) / len(latents) * 1000).long()
    signal, spread = (
        x[:, None, None, None] for x in (kept[times].sqrt(), (1 - kept[times]).sqrt())
    )
    noise = torch.randn_like(latents)
    words = pipeline.text_encoder(input_ids=ids).last_hidden_state
    predicted = pipeline.unet(signal * latents + spread * noise, times, words).sample
    return F.mse_loss(predicted, signal * noise - spread * latents)


def save(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Write the trained parts as diffusers does, in fp16."""
    parts = {
        name: {key: value.half() for key, value in get_peft_model_state_dict(module).items()}
        for name, module in (("unet", pipeline.unet), ("text_encoder", pipeline.text_encoder))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    StableDiffusionPipeline.save_lora_weights(
        path.parent,
        unet_lora_layers=parts["unet"],
        text_encoder_lora_layers=parts["text_encoder"],
        weight_name=path.name,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, write the LoRA, and print what it changes on held-out captions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=LORA, help=".safetensors file to write")
    parser.add_argument("--steps", type=int, default=_STEPS)
    parser.add_argument("--scenes", type=int, default=_SCENES)
    parser.add_argument("--evaluated", type=int, default=16, help="held-out captions")
    given = parser.parse_args(arguments)
    captions = captions_of(MODEL)[: given.evaluated]
    pipeline = load_pipeline(MODEL, "cpu")
    before = colourfulness(generate(pipeline, captions, steps=STEPS, guidance=GUIDANCE))
    losses = train_lora(pipeline, given.steps, given.scenes)
    save(pipeline, given.out)
    after = colourfulness(generate(pipeline, captions, steps=STEPS, guidance=GUIDANCE))
    print(
        f"{given.out}: {given.out.stat().st_size} bytes; loss {np.mean(losses[:20]):.4f} -> "
        f"{np.mean(losses[-20:]):.4f}; colourfulness of {len(captions)} pictures {before:.1f} -> "
        f"{after:.1f}"
    )


if __name__ == "__main__":
    main()
