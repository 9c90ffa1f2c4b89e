"""Text encoders of single-file checkpoints, and the tokenizers that no such file holds."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from optimizer.families.base_checkpoint import Config, Part, assets

if TYPE_CHECKING:
    from torch import Tensor

    Weights = dict[str, Tensor]

__all__ = ["clip", "open_clip", "t5", "write_clip_vocabulary", "write_t5_tokenizer"]


def clip(folder: str, title: str, prefix: str, *, projection: str = "none") -> Part:
    """A CLIP text encoder under transformers' own names.

    `projection` is "none", "file" or "identity": Stable Diffusion 3 takes CLIP-L's pooled output as
    it is, where its diffusers class has a projection (diffusers' own converter puts the identity
    there too); what a file has under that name was never used.
    """

    def rename(weights: Weights, config: Config) -> Weights:
        import torch

        renamed = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        if projection == "identity":
            dtype = next(iter(renamed.values())).dtype
            renamed["text_projection.weight"] = torch.eye(config["hidden_size"]).to(dtype)
        return renamed

    unused = () if projection == "file" else (f"{prefix}text_projection*",)
    return Part(folder, title, (prefix,), rename, leftovers=unused)


def open_clip(folder: str, title: str, prefix: str, *, layers: int | None = None) -> Part:
    """A text encoder under OpenCLIP's names, its queries, keys and values in one matrix.

    With `layers`, only so many are used, and the projection isn't: Stable Diffusion 2.x.
    """

    def rename(weights: Weights, config: Config) -> Weights:
        from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

        model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
        renamed: Weights = convert_open_clip_checkpoint(model, weights, prefix=prefix)
        # these were copied in parts
        for name in [name for name in weights if ".in_proj_" in name or "text_proj" in name]:
            del weights[name]
        return renamed

    blocks = f"{prefix}transformer.resblocks."
    cut = () if layers is None else (f"{blocks}{layers}.*", f"{prefix}text_projection")
    return Part(folder, title, (prefix,), rename, leftovers=(f"{prefix}attn_mask", *cut))


def t5(folder: str, prefix: str) -> Part:
    """T5's encoder under transformers' own names."""
    embedding = "encoder.embed_tokens.weight"

    def rename(weights: Weights, config: Config) -> Weights:  # noqa: ARG001
        renamed = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        # one matrix under two names; files have either or both
        table = renamed.pop(embedding, None)
        if table is not None and renamed.setdefault("shared.weight", table) is not table:
            del weights[prefix + embedding]
        return renamed

    # some files carry the tokenizer's sentencepiece model as a tensor
    return Part(folder, "T5-XXL text encoder", (prefix,), rename, leftovers=("*spiece_model",))


def write_clip_vocabulary(folder: Path) -> None:
    """Write CLIP's vocab.json (49408 entries) and merges.txt from the shipped merges.

    As in OpenAI's simple_tokenizer.py: 256 bytes, the same ending a word, one entry a merge, two
    marks.
    """
    text = gzip.decompress((assets("clip") / "merges.txt.gz").read_bytes()).decode()
    merges = text.splitlines()[1:]
    characters = _byte_characters()
    words = [*characters, *(character + "</w>" for character in characters)]
    words += ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merges.txt").write_text(text, encoding="utf-8", newline="\n")
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8", newline="\n")


def write_t5_tokenizer(folder: Path) -> None:
    """Write T5's tokenizer.json (32100 entries)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = lzma.decompress((assets("t5") / "tokenizer.json.xz").read_bytes())
    (folder / "tokenizer.json").write_bytes(tokenizer)


def _byte_characters() -> list[str]:
    """Return a visible character for each byte, in CLIP's order: those that are visible first."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = 256 - len(visible)
    return [chr(byte) for byte in visible] + [chr(256 + i) for i in range(others)]
