"""Write the trained parts as a diffusers StableDiffusionPipeline folder in fp16."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from benchmarks.reference_model.captions import PHRASINGS, caption_of, sample_scenes
from benchmarks.reference_model.diffusion import Conditioned, build_scheduler

STEPS = 20
GUIDANCE = 3.0
CALIBRATION_CAPTIONS = 128
EVALUATION_CAPTIONS = 200
_CALIBRATION_SEED = 2
_EVALUATION_SEED = 3


def export_pipeline(
    out: Path, vae: AutoencoderKL, model: Conditioned, tokenizer: CLIPTokenizer
) -> None:
    """Write `out` anew: weights in fp16 safetensors, kiln.json and the two prompt lists."""
    parts = (vae, model.text_encoder, model.unet)
    halves = [copy.deepcopy(part).to("cpu", torch.float16) for part in parts]
    pipeline = StableDiffusionPipeline(
        vae=halves[0],
        text_encoder=halves[1],
        tokenizer=tokenizer,
        unet=halves[2],
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.vae.register_to_config(_name_or_path="")  # where it lay on this machine
    pipeline.save_pretrained(partial, safe_serialization=True)
    settings = {"steps": STEPS, "guidance": GUIDANCE}
    (partial / "kiln.json").write_text(json.dumps(settings) + "\n")
    _write_prompts(partial / "prompts")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _write_prompts(folder: Path) -> None:
    folder.mkdir()
    lists = {
        "calibration.txt": (_CALIBRATION_SEED, CALIBRATION_CAPTIONS, False),
        "evaluation.txt": (_EVALUATION_SEED, EVALUATION_CAPTIONS, True),
    }
    for name, (seed, count, held_out) in lists.items():
        scenes = sample_scenes(seed, count, held_out=held_out, two_things=0.5)
        lines = [caption_of(scene, index % PHRASINGS) for index, scene in enumerate(scenes)]
        (folder / name).write_text("\n".join(lines) + "\n")


def folder_bytes(folder: Path) -> int:
    """Size of all files in the folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
