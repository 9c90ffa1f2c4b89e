"""LPIPS and CLIP score: found offline or absent, and what becomes of them in a report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks.comparison import Comparison
from benchmarks.learned import CLIP_MODELS, Learned, find_learned
from benchmarks.measure import Measured
from benchmarks.report import render
from tests.tiny_pipelines import TINY_TOKENS, tiny_tokenizer

Make = Callable[..., Measured]
Tally = Callable[..., Comparison]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and torch.hub folder, in place of this machine's."""
    import torch
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path


def keep_tiny_clip(cache: Path, name: str) -> None:
    """Put a CLIP of random weights where the hub's client would have put the real one."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    revision = "0" * 40
    repository = cache / "hub" / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / revision
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    tokenizer = tiny_tokenizer()
    config = CLIPConfig(
        text_config={
            **small,
            "num_attention_heads": 4,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": TINY_TOKENS,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**small, "num_attention_heads": 4, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"shortest_edge": 32}
    CLIPImageProcessorPil(size=side, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)


def test_without_weights_on_this_machine_nothing_is_measured(cache: Path) -> None:  # noqa: ARG001
    assert find_learned() == Learned()


def test_clip_of_the_hubs_cache_scores_each_pair(cache: Path) -> None:
    """Text and picture matter, and batches don't: 20 pairs are more than one."""
    keep_tiny_clip(cache, CLIP_MODELS[1])
    found = find_learned()
    assert found.clip_model == CLIP_MODELS[1]
    assert found.clip_score is not None
    noise = np.random.default_rng(0).integers(0, 255, (20, 40, 48, 3), dtype=np.uint8)
    captions = [f"a picture {number}" for number in range(20)]
    scores = found.clip_score(list(noise), captions)
    assert scores[17] == pytest.approx(found.clip_score([noise[17]], [captions[17]])[0], abs=1e-3)
    assert len(scores) == 20
    assert all(0 <= score <= 100 for score in scores)
    assert found.clip_score([noise[0]], ["other"]) != pytest.approx([scores[0]], abs=1e-3)


def test_lpips_is_taken_where_its_backbone_lies_on_this_machine(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package itself stands in: its torchvision has no build for this project's machines."""
    import torch

    seen = []

    class Stand(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert (net, verbose) == ("alex", False)

        def forward(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
            seen.append((tuple(one.shape), float(one.min()), float(two.max())))
            return (one - two).abs().mean()

    package = ModuleType("lpips")
    package.LPIPS = Stand  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "lpips", package)
    monkeypatch.setattr("benchmarks.learned.find_spec", lambda name: name)
    assert find_learned().lpips is None
    checkpoint = cache / "torch" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    distance = find_learned().lpips
    assert distance is not None
    black, white = (np.full((8, 6, 3), value, dtype=np.uint8) for value in (0, 255))
    assert distance(black, white) == pytest.approx(2.0)
    assert seen == [((1, 3, 8, 6), -1.0, 1.0)]


def test_learned_measures_stand_in_rows_pictures_and_page_only_where_taken(
    measurement: Make, compare_measured: Tally, tmp_path: Path
) -> None:
    def lpips(reference: np.ndarray, picture: np.ndarray) -> float:
        return float(np.abs(reference.astype(int) - picture).mean()) / 255

    def clip(_pictures: object, captions: list[str]) -> list[float]:
        return [float(len(caption)) for caption in captions]

    result = measurement("one", "three")
    plain = compare_measured(result)
    assert plain.levels[1].lpips is None
    assert "CLIP score" not in render(plain, tmp_path)
    assert "LPIPS" not in render(plain, tmp_path)
    full = compare_measured(result, learned=Learned(lpips, clip, "tiny"))  # type: ignore[arg-type]
    assert full.levels[0].lpips == 0.0
    assert full.levels[1].lpips is not None
    assert full.levels[1].lpips > 0
    assert full.levels[1].clip_score == pytest.approx(4.0)
    assert full.pictures[1].shots["int8"].clip_score == 5.0
    assert full.levels[1].intervals["clip_score"] == (3.0, 5.0)
    page = render(full, tmp_path)
    assert '<th scope="col">CLIP score</th>' in page
    assert "LPIPS" in page
