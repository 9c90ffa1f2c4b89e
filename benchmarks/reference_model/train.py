"""Train the reference model from nothing: `python -m benchmarks.reference_model.train`.

Stages: pictures, VAE, latents, classifier, text encoder, denoiser, the VAE's decoder once more,
export, samples, evaluation. Each stage leaves a file in the work folder, so that a killed run
resumes where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from platformdirs import user_cache_path
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from benchmarks.reference_model import (
    autoencoder,
    dataset,
    diffusion,
    exporting,
    judging,
    understanding,
)
from benchmarks.reference_model.adherence import Adherence, save_reader
from benchmarks.reference_model.captions import PHRASINGS, Scene, caption_of
from benchmarks.reference_model.evaluate import (
    MODEL,
    captions_of,
    evaluate,
    generate,
    load_pipeline,
    table,
)
from benchmarks.reference_model.optimising import Exchange, Run, Settings, parameter_count
from benchmarks.reference_model.samples import write_sheet
from benchmarks.reference_model.wording import build_tokenizer, token_ids

_TOKENIZER_SCENES = 3000


@dataclass(frozen=True)
class Schedule:
    """How much of everything a training run does."""

    scenes: int
    rebuilt: int
    vae: Settings
    decoder: Settings
    text: Settings
    diffusion: Settings
    reader: Settings
    evaluated: int
    shown: int


@dataclass(frozen=True)
class Job:
    """What the processes of one training run are told."""

    work: Path
    device: str
    schedule: Schedule
    out: Path


FULL = Schedule(
    scenes=24_000,
    rebuilt=2_000,
    vae=Settings(steps=3000, batch=8, peak_rate=1e-3, warmup=30, average=0.99, cooldown=0.8),
    decoder=Settings(steps=700, batch=8, peak_rate=7e-4, warmup=30, average=0.99),
    text=Settings(steps=1000, batch=128, peak_rate=1e-3, average=0.99),
    diffusion=Settings(
        steps=5000, batch=16, peak_rate=8e-4, warmup=100, average=0.998, cooldown=0.5
    ),
    reader=Settings(steps=800, batch=32, peak_rate=3e-3, average=0.99),
    evaluated=200,
    shown=32,
)

SMOKE = Schedule(
    scenes=64,
    rebuilt=32,
    vae=Settings(steps=2, batch=4, peak_rate=1e-4),
    decoder=Settings(steps=2, batch=4, peak_rate=1e-4),
    text=Settings(steps=2, batch=8, peak_rate=1e-4),
    diffusion=Settings(steps=2, batch=4, peak_rate=1e-4),
    reader=Settings(steps=2, batch=8, peak_rate=1e-4),
    evaluated=2,
    shown=2,
)


def train(run: Run, schedule: Schedule, out: Path, sheet: Path) -> None:
    """Run every stage that the work folder doesn't have yet, then export and evaluate."""
    scenes = dataset.training_scenes(schedule.scenes)
    with run.in_turn():
        pictures = dataset.stored_pictures(run.work / "pictures.npy", scenes)[: len(scenes)]
    run.log("pictures", f"{len(pictures)} drawn")
    vae = _vae(run, pictures, scenes, schedule.vae)
    latents = _latents(run, vae, pictures)
    reader = judging.train_reader(run, vae, scenes, pictures, schedule.rebuilt, schedule.reader)
    tokenizer = build_tokenizer(scenes[:_TOKENIZER_SCENES])
    captions = [caption_of(s, phrasing) for s in scenes for phrasing in range(PHRASINGS)]
    ids = token_ids(tokenizer, captions).reshape(len(scenes), PHRASINGS, -1)
    empty = token_ids(tokenizer, [""])[0]
    text = understanding.train_text_encoder(run, tokenizer, scenes, ids, schedule.text)
    model = diffusion.train_diffusion(run, text, latents, ids, empty, schedule.diffusion)
    autoencoder.train_decoder(run, vae, pictures, schedule.decoder)
    if run.rank > 0:
        return
    _log_psnr(run, vae, scenes[:600], first_seed=len(scenes))
    _log_parameters(run, vae, model, reader)
    exporting.export_pipeline(out, vae, model, tokenizer)
    save_reader(reader, out / "adherence")
    run.log("export", f"{out}: {exporting.folder_bytes(out) / 1e6:.2f} MB")
    _show(run, out, sheet, schedule.shown)
    steps, guidance = exporting.STEPS, exporting.GUIDANCE
    scores = evaluate(out, run.device, limit=schedule.evaluated, steps=steps, guidance=guidance)
    run.log("evaluation", f"per cent, {schedule.evaluated} held-out captions\n{table(scores)}")


def _vae(
    run: Run, pictures: NDArray[np.uint8], scenes: list[Scene], settings: Settings
) -> AutoencoderKL:
    """Load the trained VAE, or train it and print its PSNR."""
    folder = run.work / "vae"
    if not (folder / "config.json").exists():
        vae = autoencoder.train_autoencoder(run, pictures, settings)
        with run.in_turn():
            if run.rank == 0:
                _log_psnr(run, vae, scenes[:600], first_seed=len(scenes))
                vae.save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder).to(run.device).eval()


def _log_psnr(run: Run, vae: AutoencoderKL, scenes: list[Scene], *, first_seed: int) -> None:
    """Print the PSNR of the VAE's copies of new drawings."""
    drawings = dataset.pictures_of(scenes, first_seed)
    kinds = [scene.background.kind for scene in scenes]
    psnr = autoencoder.psnr_by_background(vae, drawings, kinds, run.device)
    run.log("vae", "PSNR dB " + ", ".join(f"{k} {v:.1f}" for k, v in psnr.items()))


def _latents(run: Run, vae: AutoencoderKL, pictures: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Load or compute the scaled latents [n, 4, 16, 16]; each process computes its part."""
    paths = [run.work / f"latents-{part}-of-{run.ranks}.npy" for part in range(run.ranks)]
    mine = paths[run.rank]
    if not mine.exists():
        edges = np.linspace(0, len(pictures), run.ranks + 1).astype(int)
        chosen = pictures[edges[run.rank] : edges[run.rank + 1]]
        found: Tensor = autoencoder.encode(vae, chosen, run.device) * vae.config.scaling_factor
        run.log("latents", f"{len(found)}, standard deviation {float(found.std()):.3f}")
        partial = mine.with_suffix(".partial.npy")
        np.save(partial, found.numpy().astype(np.float16))
        partial.replace(mine)
    run.meet()
    return np.concatenate([np.load(path) for path in paths])


def _log_parameters(
    run: Run, vae: AutoencoderKL, model: diffusion.Conditioned, reader: torch.nn.Module
) -> None:
    counts = {
        "vae": vae,
        "unet": model.unet,
        "text encoder": model.text_encoder,
        "classifier": reader,
    }
    text = ", ".join(f"{name} {parameter_count([m]):,}" for name, m in counts.items())
    run.log("parameters", text)


def _show(run: Run, out: Path, sheet: Path, count: int) -> None:
    """Write the sample sheet of the first held-out captions."""
    captions = captions_of(out)[:count]
    images = generate(
        load_pipeline(out, run.device),
        captions,
        steps=exporting.STEPS,
        guidance=exporting.GUIDANCE,
    )
    write_sheet(sheet, images, captions)
    score = Adherence.load(out).score(images, captions)
    run.log("samples", f"{sheet}: {count} pictures, adherence {100 * score.mean:.1f} %")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, help="folder of checkpoints and drawn pictures")
    parser.add_argument("--out", type=Path, default=MODEL, help="pipeline folder to write")
    parser.add_argument("--processes", type=int, help="on the CPU, default 2; with --smoke 1")
    parser.add_argument("--smoke", action="store_true", help="every stage, a few steps each")
    given = parser.parse_args(arguments)
    name = "smoke" if given.smoke else "full"
    work = given.work or user_cache_path("kiln") / "reference_model" / name
    work.mkdir(parents=True, exist_ok=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    job = Job(work, given.device, SMOKE if given.smoke else FULL, given.out)
    ranks = given.processes or (1 if given.smoke or given.device != "cpu" else 2)
    if ranks == 1:
        _work(0, None, job)
    else:
        spawn(_work, (Exchange.among(ranks), job), nprocs=ranks)  # type: ignore[no-untyped-call]


def _work(rank: int, exchange: Exchange | None, job: Job) -> None:
    """Train as one of several processes with one CPU thread each, or alone."""
    if exchange is not None:
        torch.set_num_threads(1)
    run = Run(job.work, torch.device(job.device), rank=rank, exchange=exchange)
    train(run, job.schedule, job.out, job.out.with_name("samples.png"))


if __name__ == "__main__":
    main()
