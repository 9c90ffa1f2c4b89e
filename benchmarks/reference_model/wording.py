"""The tokenizer: byte-pair merges learned from the caption grammar, with every byte as fallback."""

from __future__ import annotations

import json

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from benchmarks.reference_model.captions import PHRASINGS, Scene, caption_of

TOKENS = 32
"""Length of every caption in tokens, with start and end."""

_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(scenes: list[Scene]) -> CLIPTokenizer:
    """Return a CLIPTokenizer to which every word of the scenes' captions is one token."""
    captions = [caption_of(scene, i % PHRASINGS) for i, scene in enumerate(scenes)]
    merges = _learn_merges(captions)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    words += ["".join(pair) for pair in merges]
    vocabulary = {word: index for index, word in enumerate([*dict.fromkeys(words), _START, _END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def _learn_merges(captions: list[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges, the most frequent first, until every word is whole."""
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
    )
    model.train_from_iterator(captions, trainer)
    model.pre_tokenizer = None
    merges: list[list[str]] = json.loads(model.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return the captions' token ids, padded with the end token: [n, 32] int64."""
    found = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True)
    return torch.from_numpy(np.asarray(found["input_ids"], np.int64))
