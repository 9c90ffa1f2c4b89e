"""Prompts of pipelines with several text encoders, against diffusers' own encoding, and drawn."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import runners
from profiles.errors import SpecError, UnsupportedError
from runners.prompting import prompts_of
from runners.requests import Request
from runners.signature import Dim
from runners.workflows import pictures
from tests.runners.token_ranges import with_tokens
from tests.tiny_pipelines import TINY, TINY_TOKENS, tiny_flux

Eager = Callable[[str], Any]
MakeBundle = Callable[..., Path]
Made = dict[str, torch.Tensor]

ROOM = TINY_TOKENS - 2
SEVERAL = ("sdxl", "sd3", "flux")
AXES = {
    "sdxl": Dim(name="tokens", min=32, opt=32, max=96, multiple_of=32),
    "sd3": Dim(name="tokens", min=33, opt=288, max=544),
    "flux": Dim(name="tokens", min=1, opt=512, max=512),
}
"""As optimizer.families makes them of the tiny pipelines."""
LIMIT = 1
"""In 255: fp32 sums in another order move a picture by 1e-5, which crosses at most one rounding."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny pipelines' folders, named as those of tests/optimizer/test_families.py: the store
    has their bundles then.
    """
    root = tmp_path_factory.mktemp("several")

    def get(name: str) -> Path:
        return root / name if (root / name).exists() else TINY[name](root / name)

    return get


@pytest.fixture(scope="module")
def eager(models: Callable[[str], Path]) -> Eager:
    """diffusers' own pipeline, loaded once, as if its denoiser were an engine."""
    loaded: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in loaded:
            plain = diffusers.DiffusionPipeline.from_pretrained(models(name), local_files_only=True)
            plain.set_progress_bar_config(disable=True)
            loaded[name] = plain
        return with_tokens(loaded[name], AXES[name])

    return get


@torch.no_grad()
def own(pipeline: Any, text: str, **more: Any) -> Made:
    """diffusers' own encoding, by the names that the pipeline's call takes."""
    asked = {"prompt": text, "prompt_2": None, "prompt_3": None, "device": "cpu", **more}
    taken = inspect.signature(pipeline.encode_prompt).parameters
    found = pipeline.encode_prompt(**{k: value for k, value in asked.items() if k in taken})
    names = ["prompt_embeds", "pooled_prompt_embeds"]
    if "negative_prompt" in taken:
        names = [f"{start}{name}" for name in names for start in ("", "negative_")]
    return dict(zip(names, found, strict=False))


def equal(found: Made, wanted: Made) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in found)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a" * ROOM,
        "  two\nlines ",
        "\N{CJK UNIFIED IDEOGRAPH-732B}, \N{CAT}!",
        "\N{ARABIC LETTER MEEM}\N{ARABIC LETTER REH} e\N{COMBINING ACUTE ACCENT}",
    ],
    ids=["empty", "plain", "full", "lines", "chinese", "arabic"],
)
@pytest.mark.parametrize("name", SEVERAL)
def test_a_short_prompt_without_weights_is_diffusers_own(
    eager: Eager, name: str, text: str
) -> None:
    found = prompts_of(eager(name), text, "" if name == "flux" else "blue", clip_skip=None)
    assert equal(found.one, own(eager(name), text, negative_prompt="blue"))
    assert found.facts == {}
    assert found.notes == ()
    for key, two in found.arguments(2).items():
        assert torch.equal(two, torch.cat([found.one[key]] * 2))


def test_an_empty_negative_prompt_is_zeros_where_the_model_says_so(eager: Eager) -> None:
    pipeline = eager("sdxl")
    assert pipeline.config.force_zeros_for_empty_prompt
    assert equal(prompts_of(pipeline, "a", "", clip_skip=None).one, own(pipeline, "a"))
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        encoded = prompts_of(pipeline, "a", "", clip_skip=None).one
        assert equal(encoded, own(pipeline, "a", negative_prompt=""))
        assert encoded["negative_prompt_embeds"].abs().max() > 0
    finally:
        pipeline.register_to_config(force_zeros_for_empty_prompt=True)


def test_sdxls_chunks_are_of_both_encoders_and_the_first_is_pooled(eager: Eager) -> None:
    pipeline = eager("sdxl")
    text = f"{'a' * ROOM} {'b' * ROOM} c"
    found = prompts_of(pipeline, text, "blue BREAK red", clip_skip=None).one
    chunks = [own(pipeline, part) for part in ("a" * ROOM, "b" * ROOM)]
    states = found["prompt_embeds"].split(TINY_TOKENS, dim=1)
    assert len(states) == 3
    assert torch.equal(states[0], chunks[0]["prompt_embeds"])
    assert torch.equal(found["pooled_prompt_embeds"], chunks[0]["pooled_prompt_embeds"])
    negative = [own(pipeline, part)["prompt_embeds"] for part in ("blue", "red", "")]
    assert torch.equal(found["negative_prompt_embeds"], torch.cat(negative, dim=1))


def changed(found: torch.Tensor, plain: torch.Tensor) -> list[int]:
    """The tokens whose embeddings differ."""
    return [int(i) for i in (found != plain).any(-1)[0].nonzero()]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("sdxl", [2, 3, 4]),  # after the start and "a"
        ("sd3", [2, 3, 4, *(32 + i for i in (2, 3, 4, 5))]),  # a T5's words begin with a mark
        ("flux", [2, 3, 4, 5]),
    ],
)
def test_weights_change_the_embeddings_of_their_words_alone(
    eager: Eager, name: str, tokens: list[int]
) -> None:
    weighted = prompts_of(eager(name), "a (red:1.5) cat", "", clip_skip=None).one
    plain = own(eager(name), "a red cat")
    assert changed(weighted["prompt_embeds"], plain["prompt_embeds"]) == tokens
    torch.testing.assert_close(
        weighted["prompt_embeds"][:, tokens], 1.5 * plain["prompt_embeds"][:, tokens]
    )
    assert torch.equal(weighted["pooled_prompt_embeds"], plain["pooled_prompt_embeds"])


def test_a_weight_inside_a_word_leaves_a_t5s_tokens_as_they_are(eager: Eager) -> None:
    found = prompts_of(eager("flux"), "c(ir:2)cle", "", clip_skip=None).one["prompt_embeds"]
    assert changed(found, own(eager("flux"), "circle")["prompt_embeds"]) == [2, 3]


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_clip_skip_is_a_layer_of_all_clips_for_both_prompts(eager: Eager, name: str) -> None:
    """2 is diffusers' none; 1 the last layer, which diffusers counts as -1."""
    pipeline = eager(name)
    usual, last, second = (
        prompts_of(pipeline, "a", "b", clip_skip=layer).one for layer in (None, 1, 2)
    )
    assert equal(second, usual)
    wanted = own(pipeline, "a", negative_prompt="b", clip_skip=-1)
    assert torch.equal(last["prompt_embeds"], wanted["prompt_embeds"])
    other = own(pipeline, "b", clip_skip=-1)
    assert torch.equal(last["negative_prompt_embeds"], other["prompt_embeds"])
    assert torch.equal(last["pooled_prompt_embeds"], usual["pooled_prompt_embeds"])
    with pytest.raises(SpecError, match="--clip-skip 3 is more than the text encoder's 2 layers"):
        prompts_of(pipeline, "a", "", clip_skip=3)


def test_flux_reads_no_layer_and_takes_no_negative_prompt(eager: Eager) -> None:
    with pytest.raises(UnsupportedError, match="--clip-skip 2 is for models that read the layers"):
        prompts_of(eager("flux"), "a", "", clip_skip=2)
    found = prompts_of(eager("flux"), "a", "blue", clip_skip=1)
    assert set(found.one) == {"prompt_embeds", "pooled_prompt_embeds"}
    assert found.facts == {"negative_prompt_dropped": "blue"}
    assert found.notes == ('Warning: this model takes no negative prompt; "blue" is left out.',)


@pytest.mark.parametrize(
    ("name", "room"), [("sdxl", 3 * ROOM), ("sd3", 511), ("flux", 511)], ids=SEVERAL
)
def test_ten_thousand_characters_are_cut_and_said(eager: Eager, name: str, room: int) -> None:
    text = "cat " * 2500
    found = prompts_of(eager(name), text, "", clip_skip=None)
    dropped = found.facts["prompt_dropped"]
    assert text.strip().endswith(dropped)
    assert len(dropped) > 7000
    [note] = found.notes
    assert note.startswith(f"Warning: the prompt is longer than the {room} tokens that the bundle")
    assert f'"{dropped[:60]}..." is left out.' in note
    lengths = {key: value.shape[1] for key, value in found.one.items() if "pooled" not in key}
    assert set(lengths.values()) == {AXES[name].max}


def test_a_prompt_that_256_tokens_do_not_hold_has_512(eager: Eager) -> None:
    text = "a" * 255 + " b"
    found = prompts_of(eager("sd3"), text, "blue", clip_skip=None)
    wanted = own(eager("sd3"), text, negative_prompt="blue", max_sequence_length=512)
    assert equal(found.one, wanted)
    assert found.notes == ()


def test_sd3_without_its_t5_has_zeros_in_its_place_and_clip_in_chunks(eager: Eager) -> None:
    pipeline = eager("sd3")
    parts = {f"text_encoder{end}": getattr(pipeline, f"text_encoder{end}") for end in ("", "_2")}
    names = ("tokenizer", "tokenizer_2", "tokenizer_3", "transformer", "scheduler", "vae")
    parts |= {name: getattr(pipeline, name) for name in names}
    small = diffusers.StableDiffusion3Pipeline(**parts, text_encoder_3=None)
    with_tokens(small, AXES["sd3"])
    found = prompts_of(small, "a (red:1) cat", "blue", clip_skip=None).one
    assert equal(found, own(small, "a red cat", negative_prompt="blue"))
    long = prompts_of(small, "a" * ROOM + "b" * 1000, "", clip_skip=None)
    states = long.one["prompt_embeds"]
    assert states.shape[1] == 9 * TINY_TOKENS + 256
    assert states[:, -256:].abs().max() == 0
    assert len(long.facts["prompt_dropped"]) == 1000 - 8 * ROOM


def test_flux_schnell_reads_256_tokens(tmp_path: Path) -> None:
    folder = tiny_flux(tmp_path / "schnell", guided=False)
    pipeline = diffusers.FluxPipeline.from_pretrained(folder, local_files_only=True)
    with_tokens(pipeline, AXES["flux"])
    found = prompts_of(pipeline, "a" * 300, "", clip_skip=None)
    assert equal(found.one, own(pipeline, "a" * 300, max_sequence_length=256))
    assert found.facts == {"prompt_dropped": "a" * 46}  # of 254 letters, a mark and the end


def test_a_refiner_asks_its_second_encoder_alone(eager: Eager) -> None:
    base = eager("sdxl")
    refiner = SimpleNamespace(
        tokenizer=None,
        text_encoder=None,
        tokenizer_2=base.tokenizer_2,
        text_encoder_2=base.text_encoder_2,
        config={},
        kiln=base.kiln,
        _execution_device="cpu",
    )
    found = prompts_of(refiner, "a red cat", "b", clip_skip=None).one
    both = own(base, "a red cat", negative_prompt="b")
    width = base.text_encoder.config.hidden_size
    assert torch.equal(found["prompt_embeds"], both["prompt_embeds"][..., width:])
    assert torch.equal(found["pooled_prompt_embeds"], both["pooled_prompt_embeds"])


@pytest.fixture(scope="module")
def engines(
    bundle: MakeBundle, tiny_model: Path, models: Callable[[str], Path]
) -> Iterator[Callable[[str], tuple[Any, Any]]]:
    """A bundle's pipeline, and diffusers' own whose prompts are cut as the bundle's."""
    loaded = []

    def get(name: str) -> tuple[Any, Any]:
        folder = tiny_model if name == "sd1" else models(name)
        made = bundle("openvino") if name == "sd1" else bundle("onnxruntime", model=folder)
        ours = runners.load(made, threads=1)
        loaded.append(ours)
        plain = type(ours).from_pretrained(folder, local_files_only=True)
        plain.set_progress_bar_config(disable=True)
        plain.kiln = ours.kiln
        return ours, plain

    yield get
    for pipeline in loaded:
        pipeline.kiln.close()


@pytest.mark.parametrize(
    ("name", "clip_skip"),
    [
        ("sd1", None),
        ("sdxl", 1),
        pytest.param("sd3", None, marks=pytest.mark.slow),
        pytest.param("flux", None, marks=pytest.mark.slow),
    ],
)
def test_a_long_weighted_prompt_draws_on_engines_what_it_draws_in_eager(
    engines: Callable[[str], tuple[Any, Any]], name: str, clip_skip: int | None
) -> None:
    ours, plain = engines(name)
    text = "a (red:1.4) circle BREAK " + "on a [blue] ground, " * 4
    size: dict[str, Any] = {"width": 64, "height": 64}
    request = Request(text, "blurry", steps=3, guidance=4.0, seed=3, clip_skip=clip_skip, **size)
    [(found, facts)] = list(pictures(ours, request))
    given = prompts_of(plain, text, "blurry", clip_skip=clip_skip)
    assert facts.get("negative_prompt_dropped") == given.facts.get("negative_prompt_dropped")
    if name in ("sd1", "sdxl"):
        assert given.one["prompt_embeds"].shape[1] == 3 * TINY_TOKENS
    [wanted] = plain(
        **given.arguments(1),
        num_inference_steps=3,
        guidance_scale=4.0,
        **size,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images
    pixels = [np.asarray(image, dtype=np.int16) for image in (found, wanted)]
    assert pixels[1].std() > 1, "a flat picture proves nothing"
    assert np.abs(pixels[0] - pixels[1]).max() <= LIMIT
