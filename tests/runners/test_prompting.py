"""Prompts as embeddings, against diffusers' own encoding and against sums by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from profiles.errors import SpecError, UnsupportedError
from runners.prompting import prompts_of
from runners.signature import Dim
from tests.runners.token_ranges import with_tokens
from tests.tiny_pipelines import TINY_TOKENS

ROOM = TINY_TOKENS - 2
TOKENS = Dim(name="tokens", min=32, opt=32, max=96, multiple_of=32)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Any:
    """Its last layer norm has a bias, so that embeddings have a mean, as trained ones do."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipeline.text_encoder.final_layer_norm.bias += 0.3
    return pipeline


@torch.no_grad()
def own(pipeline: Any, text: str) -> torch.Tensor:
    """diffusers' own embeddings of one text."""
    found: torch.Tensor = pipeline.encode_prompt(text, "cpu", 1, False)[0]
    return found


@pytest.mark.parametrize(
    "text",
    ["", "a red circle", "a" * ROOM, "  two\nlines ", "\N{CJK UNIFIED IDEOGRAPH-732B}, \N{CAT}!"],
    ids=["empty", "plain", "full", "lines", "scripts"],
)
@pytest.mark.parametrize("axis", [TINY_TOKENS, TOKENS], ids=["fixed", "range"])
def test_a_short_prompt_without_weights_is_diffusers_own(
    plain: Any, text: str, axis: int | Dim
) -> None:
    found = prompts_of(with_tokens(plain, axis), text, "blue", clip_skip=None)
    assert torch.equal(found.one["prompt_embeds"], own(plain, text))
    assert torch.equal(found.one["negative_prompt_embeds"], own(plain, "blue"))
    assert found.facts == {}
    assert found.notes == ()
    two = found.arguments(2)["prompt_embeds"]
    assert torch.equal(two, torch.cat([own(plain, text)] * 2))


def test_weights_scale_the_tokens_and_the_mean_is_restored(plain: Any) -> None:
    found = prompts_of(with_tokens(plain, 32), "a (red:1.5) cat", "[blue]", clip_skip=None).one
    states = own(plain, "a red cat")
    weights = torch.ones(32)
    weights[2:5] = 1.5  # after the start and "a"
    scaled = states * weights[:, None]
    torch.testing.assert_close(found["prompt_embeds"], scaled * (states.mean() / scaled.mean()))
    torch.testing.assert_close(found["prompt_embeds"].mean(), states.mean())
    assert not torch.allclose(found["negative_prompt_embeds"], own(plain, "blue"))


def test_a_mean_that_is_only_rounding_is_not_restored(tiny_model: Path) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    found = prompts_of(with_tokens(pipeline, 32), "(a:2)", "", clip_skip=None).one
    weights = torch.ones(32)
    weights[1] = 2
    torch.testing.assert_close(found["prompt_embeds"], own(pipeline, "a") * weights[:, None])


def test_escaped_brackets_are_text(plain: Any) -> None:
    found = prompts_of(with_tokens(plain, 32), r"a \(b\)", "", clip_skip=None)
    assert torch.equal(found.one["prompt_embeds"], own(plain, "a (b)"))


def test_a_long_prompt_is_encoded_in_chunks_with_their_own_start_and_end(plain: Any) -> None:
    text = "a" * ROOM + "b" * ROOM + "cd"
    found = prompts_of(with_tokens(plain, TOKENS), text, "blue", clip_skip=None)
    chunks = found.one["prompt_embeds"].split(32, dim=1)
    ids = plain.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    for start, chunk in zip((0, ROOM, 2 * ROOM), chunks, strict=True):
        inside = [plain.tokenizer.bos_token_id, *ids[start : start + ROOM]]
        padded = inside + [plain.tokenizer.eos_token_id] * (32 - len(inside))
        with torch.no_grad():
            torch.testing.assert_close(chunk, plain.text_encoder(torch.tensor([padded]))[0])
    negative = found.one["negative_prompt_embeds"]
    assert torch.equal(negative, torch.cat([own(plain, t) for t in ("blue", "", "")], dim=1))
    assert found.notes == ()


def test_a_pipeline_draws_from_two_chunks(plain: Any) -> None:
    found = prompts_of(with_tokens(plain, TOKENS), "a" * (ROOM + 1), "", clip_skip=None)
    assert found.one["prompt_embeds"].shape == (1, 64, 32)
    drawn = plain(**found.arguments(1), num_inference_steps=1, width=32, height=32).images[0]
    assert drawn.size == (32, 32)


def test_a_range_that_skips_a_count_takes_the_next(plain: Any) -> None:
    even = Dim(name="tokens", min=32, opt=64, max=128, multiple_of=64)
    found = prompts_of(with_tokens(plain, even), "a", "", clip_skip=None)
    assert found.one["prompt_embeds"].shape == (1, 64, 32)


@pytest.mark.parametrize(("axis", "room"), [(32, ROOM), (TOKENS, 3 * ROOM)], ids=["fixed", "range"])
def test_what_does_not_fit_is_cut_and_said(plain: Any, axis: int | Dim, room: int) -> None:
    text = "a" * room + " over"
    found = prompts_of(with_tokens(plain, axis), text, "b" * 500, clip_skip=None)
    kept = torch.cat([own(plain, "a" * ROOM)] * 3, dim=1)[:, : found.one["prompt_embeds"].shape[1]]
    assert found.one["prompt_embeds"].shape == kept.shape
    assert found.facts["prompt_dropped"] == "over"
    assert len(found.facts["negative_prompt_dropped"]) == 500 - room
    assert found.notes[0] == (
        f"Warning: the prompt is longer than the {room} tokens that the bundle takes; "
        '"over" is left out.'
    )
    assert found.notes[1].endswith('b..." is left out.')


def test_a_clip_skip_beyond_the_layers_is_refused(plain: Any) -> None:
    with pytest.raises(SpecError) as caught:
        prompts_of(with_tokens(plain, 32), "a", "", clip_skip=3)
    assert str(caught.value) == (
        "--clip-skip 3 is more than the text encoder's 2 layers: use 1 to 2."
    )


def test_a_break_ends_a_chunk(plain: Any) -> None:
    found = prompts_of(with_tokens(plain, TOKENS), "a BREAK (b:1)", "", clip_skip=None)
    both = torch.cat([own(plain, "a"), own(plain, "b")], dim=1)
    assert torch.equal(found.one["prompt_embeds"], both)
    assert found.one["negative_prompt_embeds"].shape == both.shape


def test_a_model_of_other_encoders_gets_the_text(plain: Any) -> None:
    other = SimpleNamespace(tokenizer=object(), text_encoder=plain.text_encoder)
    found = prompts_of(other, r"a \(b\) BREAK d", "c", clip_skip=1)
    assert found.arguments(2) == {"prompt": ["a (b) d"] * 2, "negative_prompt": ["c"] * 2}
    with pytest.raises(UnsupportedError, match=r"The negative prompt holds weights.*write \\\("):
        prompts_of(other, "a", "(b)", clip_skip=None)
    with pytest.raises(UnsupportedError, match="--clip-skip 2 is for models with CLIP"):
        prompts_of(other, "a", "b", clip_skip=2)
