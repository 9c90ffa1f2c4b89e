"""LoRAs on engines: they draw what diffusers' own LoRAs draw, and go without a trace."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch

import runners
from profiles.errors import KilnError, SpecError, UnsupportedError
from tests.conftest import HERE, Ended, Kiln, MakeBundle
from tests.lora_files import kohya_lora, peft_lora
from tests.tiny_pipelines import tiny_flux, tiny_sdxl

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # peft, stacking

PROMPT = "a red circle on the left"


def drawn(pipeline: Any, **more: Any) -> np.ndarray[Any, Any]:
    """Latents of two steps."""
    generator = torch.Generator().manual_seed(0)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "height": 64, "width": 64, **more}
    found = pipeline(PROMPT, generator=generator, output_type="latent", **settings).images
    return np.asarray(found, np.float32)


def apart(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    """The relative error."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def plain_torch(model: Path) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(model, dtype=torch.float32)


@pytest.fixture(scope="session")
def loras(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder: a and b in diffusers' layout, k as kohya would have written a."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate("ab"):
        peft_lora(plain_torch(tiny_model), folder / f"{name}.safetensors", seed=seed, rank=4 - seed)
    kohya_lora(folder / "a.safetensors", folder / "k.safetensors")
    return folder


@pytest.fixture(scope="session")
def wanted(loras: Path, tiny_model: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What diffusers draws with its own LoRAs."""
    pipeline = plain_torch(tiny_model)
    found = {"": drawn(pipeline)}
    for name in "ab":
        pipeline.load_lora_weights(loras / f"{name}.safetensors", adapter_name=name)
    pipeline.set_adapters("a")
    found["a"] = drawn(pipeline)
    pipeline.set_adapters(["a", "b"], [1.3, -0.5])
    found["both"] = drawn(pipeline)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(loras / "k.safetensors")
    found["kohya"] = drawn(pipeline)
    assert apart(found["a"], found[""]) > 0.02
    assert apart(found["both"], found["a"]) > 0.02
    assert apart(found["kohya"], found["a"]) > 0.02
    return found


_COMPILED = [pytest.param(name, marks=pytest.mark.slow) for name in ("aoti", "aoti-blocks")]
"""Minutes each."""


@pytest.mark.parametrize("backend", [*HERE, *_COMPILED])
def test_engines_draw_what_diffusers_draws_and_forget_it(
    backend: str, bundle: MakeBundle, loras: Path, wanted: dict[str, np.ndarray[Any, Any]]
) -> None:
    pipeline = runners.load(bundle(backend, lora=True))
    before = drawn(pipeline)
    pipeline.load_lora_weights(loras / "a.safetensors", adapter_name="a")
    assert apart(drawn(pipeline), wanted["a"]) < 1e-3
    pipeline.load_lora_weights(loras, weight_name="b.safetensors", adapter_name="b")
    pipeline.set_adapters(["a", "b"], [1.3, -0.5])
    assert pipeline.get_active_adapters() == ["a", "b"]
    assert apart(drawn(pipeline), wanted["both"]) < 1e-3
    pipeline.disable_lora()
    assert np.array_equal(drawn(pipeline), before)
    pipeline.enable_lora()
    assert apart(drawn(pipeline), wanted["both"]) < 1e-3
    pipeline.delete_adapters("b")
    pipeline.set_adapters("a")
    assert apart(drawn(pipeline), wanted["a"]) < 1e-3
    pipeline.set_adapters("a", 0.0)
    assert np.array_equal(drawn(pipeline), before)
    pipeline.unload_lora_weights()
    assert np.array_equal(drawn(pipeline), before)
    assert pipeline.get_list_adapters() == {}
    pipeline.load_lora_weights(loras / "k.safetensors")
    assert apart(drawn(pipeline), wanted["kohya"]) < 1e-3
    pipeline.kiln.close()


def test_nothing_is_computed_beside_convolutions_that_no_lora_changes(
    bundle: MakeBundle,
    loras: Path,
    wanted: dict[str, np.ndarray[Any, Any]],
    tiny_model: Path,
) -> None:
    whole = safetensors.torch.load_file(loras / "a.safetensors")
    narrow = {n: x for n, x in whole.items() if ".resnets." not in n and "samplers." not in n}
    assert 0 < len(narrow) < len(whole)
    reference = plain_torch(tiny_model)
    reference.load_lora_weights(dict(narrow))
    pipeline = runners.load(bundle("openvino", lora=True))
    pipeline.load_lora_weights(narrow, adapter_name="narrow")
    assert apart(drawn(pipeline), drawn(reference)) < 1e-3
    least = pipeline.kiln.engine("unet", "lora").precisions().total()
    pipeline.load_lora_weights(loras / "a.safetensors", adapter_name="a")
    assert apart(drawn(pipeline), wanted["a"]) < 1e-3
    assert pipeline.kiln.engine("unet", "lora").precisions().total() > least
    pipeline.set_adapters("narrow")
    assert apart(drawn(pipeline), drawn(reference)) < 1e-3
    pipeline.kiln.close()


def test_parts_have_weights_of_their_own(bundle: MakeBundle, loras: Path, tiny_model: Path) -> None:
    weights = {"unet": 0.5, "text_encoder": -1.0}
    reference = plain_torch(tiny_model)
    reference.load_lora_weights(loras / "a.safetensors", adapter_name="a")
    reference.set_adapters("a", dict(weights))
    pipeline = runners.load(bundle("onnxruntime", lora=True))
    pipeline.load_lora_weights(loras / "a.safetensors", adapter_name="a")
    pipeline.set_adapters("a", weights)
    assert apart(drawn(pipeline), drawn(reference)) < 1e-3
    pipeline.kiln.close()


def _bytes(path: Path) -> bytes:
    """Of a file; a graph's without the numbers that OpenVINO gives to nodes as they come."""
    raw = path.read_bytes()
    return re.sub(rb'_\d+"', b'"', gzip.decompress(raw)) if path.suffix == ".gz" else raw


def test_the_plain_engine_is_the_one_without(bundle: MakeBundle) -> None:
    for backend in HERE:
        formed, plain = bundle(backend, lora=True), bundle(backend)
        for part in ("unet", "text_encoder"):
            for path in (plain / part).iterdir():
                if path.name == "selftest.safetensors":
                    continue  # what torch computed, twice: to its last bits
                own, found = _bytes(formed / part / path.name), _bytes(path)
                # what a form needs beside the plain engine's constants comes after them
                assert own[: len(found)] == found, path
                assert len(own) - len(found) < 20_000 * path.name.startswith("weights") + 1


def test_what_is_not_offered_says_so(bundle: MakeBundle, loras: Path) -> None:
    pipeline = runners.load(bundle("onnxruntime", lora=True))
    with pytest.raises(UnsupportedError, match="never changed"):
        pipeline.fuse_lora()
    with pytest.raises(SpecError, match="No LoRA called x is loaded: none are"):
        pipeline.set_adapters("x")
    pipeline.load_lora_weights(loras / "a.safetensors", adapter_name="a")
    with pytest.raises(SpecError, match="called a is loaded already"):
        pipeline.load_lora_weights(loras / "b.safetensors", adapter_name="a")
    with pytest.raises(SpecError, match="need as many weights"):
        pipeline.set_adapters(["a"], [1.0, 2.0])
    with pytest.raises(SpecError, match="weight nan of the LoRA a is no number"):
        pipeline.set_adapters("a", float("nan"))
    pipeline.kiln.close()


def test_a_bundle_without_inputs_for_them_refuses(bundle: MakeBundle, loras: Path) -> None:
    pipeline = runners.load(bundle("onnxruntime"))
    with pytest.raises(UnsupportedError, match="compiled without inputs for LoRAs"):
        pipeline.load_lora_weights(loras / "a.safetensors")


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
_TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def _renamed(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("attentions", "attentive"): value for key, value in found.items()}


def _cut(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**found, f"{_TO_Q}.lora_A.weight": torch.zeros(4, 7)}


def _alone(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in found.items() if key != f"{_TO_Q}.lora_B.weight"}


def _dora(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**found, f"{_TO_Q}.lora_magnitude_vector": torch.ones(4)}


def _nan(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**found, f"{_TO_Q}.lora_A.weight": found[f"{_TO_Q}.lora_A.weight"] * float("nan")}


def _biased(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**found, f"{_TO_Q}.lora_B.bias": torch.ones(4)}


def _flux(_found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    return {
        f"{name}.lora_A.weight": torch.zeros(2, 64),
        f"{name}.lora_B.weight": torch.zeros(64, 2),
    }


def _kohya_unknown(_found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "lora_unet_down_blocks_9_attentions_0_transformer_blocks_0_attn1_to_q"
    return {
        f"{name}.lora_down.weight": torch.zeros(2, 64),
        f"{name}.lora_up.weight": torch.zeros(64, 2),
        f"{name}.alpha": torch.tensor(2.0),
    }


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (_renamed, 2, "attentive"),
        (_cut, 2, f"{_TO_Q} (4x7 and "),
        (_alone, 2, f"{_TO_Q}.lora_B.weight (missing)"),
        (_dora, 10, "is a DoRA"),
        (_nan, 2, "NaN or infinity"),
        (_biased, 2, f"{_TO_Q}.lora_B.bias"),
        (_flux, 2, "transformer.single_transformer_blocks.0.attn.to_q"),
        (_kohya_unknown, 2, "down_blocks.9"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_fit_is_named_and_changes_nothing(
    change: Change, code: int, said: str, bundle: MakeBundle, loras: Path, tmp_path: Path
) -> None:
    tensors = safetensors.torch.load_file(loras / "a.safetensors")
    safetensors.torch.save_file(change(tensors), tmp_path / "wrong.safetensors")
    pipeline = runners.load(bundle("onnxruntime", lora=True))
    pipeline.load_lora_weights(loras / "b.safetensors", adapter_name="b")
    feeds = pipeline.unet.low_rank
    with pytest.raises(KilnError) as caught:
        pipeline.load_lora_weights(tmp_path / "wrong.safetensors")
    assert said in str(caught.value)
    assert "wrong.safetensors" in str(caught.value)
    assert caught.value.exit_code == code
    assert pipeline.get_active_adapters() == ["b"]
    assert pipeline.unet.low_rank is feeds


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("x.ckpt", b"PK", "isn't a .safetensors file"),
        ("x.safetensors", b"\xff" * 40, "is damaged"),
        ("x.safetensors", b"", "is damaged"),
    ],
)
def test_other_files_are_refused(
    name: str, raw: bytes, said: str, kiln: Kiln, bundle: MakeBundle, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(raw)
    ended = generated(kiln, bundle("onnxruntime", lora=True), tmp_path, "--lora", tmp_path / name)
    assert ended.code == 2
    assert said in ended.sentence


def generated(kiln: Kiln, made: Path, folder: Path, *more: object, prompt: str = PROMPT) -> Ended:
    """`kiln generate`, two steps, into out.png."""
    fixed = ("--seed", 1, "--steps", 2, "-o", folder / "out.png", "--json")
    return kiln("generate", made, "--prompt", prompt, *fixed, *more)


def test_the_command_line_draws_with_files_and_tags(
    kiln: Kiln, bundle: MakeBundle, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    from runners.metadata import read_metadata

    made = bundle("onnxruntime", lora=True)
    pictures = []
    for more, prompt in (
        (["--lora", f"{loras / 'a.safetensors'}:0.5"], PROMPT),
        (["--lora-dir", loras], f"{PROMPT} <lora:a:0.5>"),
        ([], PROMPT),
    ):
        assert generated(kiln, made, tmp_path, *more, prompt=prompt).code == 0
        with Image.open(tmp_path / "out.png") as image:
            pictures.append((np.asarray(image).copy(), image.info["parameters"]))
        facts = read_metadata(tmp_path / "out.png")
        assert facts["prompt"] == PROMPT
        named = [(lora["file"], lora["weight"]) for lora in facts.get("loras", [])]
        assert named == ([("a.safetensors", 0.5)] if more else [])
    assert np.array_equal(pictures[0][0], pictures[1][0])
    assert not np.array_equal(pictures[0][0], pictures[2][0])
    assert pictures[1][1].startswith(f"{PROMPT} <lora:a:0.5>\n")
    assert 'Lora hashes: "a: ' in pictures[1][1]
    monkeypatch.setenv("KILN_LORA_DIRS", str(loras))
    assert generated(kiln, made, tmp_path, prompt=f"<lora:b>{PROMPT}").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "eager", "aoti"])
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_on_quantized_engines_it_is_within_their_own_noise(
    backend: str, quant: str, bundle: MakeBundle, loras: Path, tiny_model: Path
) -> None:
    """The error with the LoRA is no larger than the error without it, but for a little room: the
    LoRA changes what the rounded weights see. It changes the latents by 42 %; README says what
    far stronger ones cost.
    """
    reference = plain_torch(tiny_model)
    pipeline = runners.load(bundle(backend, quant, lora=True))
    noise = apart(drawn(pipeline), drawn(reference))
    for each in (pipeline, reference):
        each.load_lora_weights(loras / "a.safetensors", adapter_name="a")
        each.set_adapters("a", 0.1)
    changed = drawn(reference)
    assert apart(changed, drawn(pipeline)) < 1.5 * noise
    pipeline.unload_lora_weights()
    assert apart(drawn(pipeline), changed) > 2 * noise
    pipeline.kiln.close()


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_sdxl, tiny_flux])
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_other_families_draw_what_diffusers_draws(
    make: Callable[[Path], Path], backend: str, bundle: MakeBundle, tmp_path: Path
) -> None:
    model = make(tmp_path / make.__name__)
    file = peft_lora(plain_torch(model), tmp_path / "lora.safetensors")
    reference = plain_torch(model)
    pipeline = runners.load(bundle(backend, model=model, lora=True))
    plain = drawn(pipeline)
    for each in (pipeline, reference):
        each.load_lora_weights(file)
    wanted = drawn(reference)
    assert apart(plain, wanted) > 0.02
    assert apart(drawn(pipeline), wanted) < 1e-3
    pipeline.unload_lora_weights()
    assert np.array_equal(drawn(pipeline), plain)
    pipeline.kiln.close()
