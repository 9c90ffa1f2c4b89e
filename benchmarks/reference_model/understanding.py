"""Teach the text encoder to understand captions, before the denoiser learns from it.

As in Stable Diffusion, the denoiser is trained with a finished text encoder. Here it learns to say,
from its state at the end of a caption, what is in each of the 3x3 cells and what the background is:
the same answers that the classifier reads from pictures. Trained together with the denoiser from
nothing, it stays at a saddle where no word moves anything to a position.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.reference_model.captions import POSITIONS, Scene
from benchmarks.reference_model.optimising import Run, Settings, optimise
from benchmarks.reference_model.reader import (
    BACKGROUND_HEADS,
    THING_HEADS,
    answers_of,
    reading_loss,
)
from benchmarks.reference_model.wording import TOKENS

WIDTH = 128
"""Length of the text encoder's states."""

_CELL_ANSWERS = 1 + sum(len(names) for names in THING_HEADS.values())
_BACKGROUND_ANSWERS = sum(len(names) for names in BACKGROUND_HEADS.values())


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return the untrained text encoder: three layers, causal, 32 positions."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Understanding(nn.Module):
    """The text encoder and the head that answers from its last state."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        """Put an untrained head on the text encoder."""
        super().__init__()
        self.text_encoder = text_encoder
        self.head = nn.Linear(WIDTH, len(POSITIONS) * _CELL_ANSWERS + _BACKGROUND_ANSWERS)

    def forward(self, ids: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [n, 32], place of an end token [n] -> logits [n, 9, 19] and [n, 31]."""
        states = self.text_encoder(input_ids=ids).last_hidden_state
        answers = self.head(states[torch.arange(len(ids), device=ids.device), ends])
        cells = answers[:, :-_BACKGROUND_ANSWERS].unflatten(1, (len(POSITIONS), _CELL_ANSWERS))
        return cells, answers[:, -_BACKGROUND_ANSWERS:]


def train_text_encoder(
    run: Run, tokenizer: CLIPTokenizer, scenes: list[Scene], ids: Tensor, settings: Settings
) -> CLIPTextModel:
    """Train on the scenes' token ids [n, phrasings, 32]; the state is read at any end token."""
    torch.manual_seed(15)
    model = Understanding(build_text_encoder(tokenizer)).to(run.device)
    answers = answers_of(scenes)
    lengths = (ids != tokenizer.eos_token_id).sum(dim=2)

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([51, step, run.rank])
        chosen = torch.from_numpy(rng.integers(len(ids), size=settings.batch))
        phrasing = torch.from_numpy(rng.integers(ids.shape[1], size=settings.batch))
        first = lengths[chosen, phrasing]
        ends = first + torch.from_numpy(rng.random(settings.batch)) * (TOKENS - first)
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            cells, background = model(
                ids[chosen, phrasing].to(run.device), ends.long().to(run.device)
            )
        return reading_loss(cells.float(), background.float(), answers[chosen].to(run.device))

    optimise(run, "text", model, settings, loss_at)
    return model.text_encoder.eval()
