"""Control networks on engines: pictures equal diffusers' own, whatever the weights and ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import runners
from runners.metadata import read_metadata
from tests.conftest import Kiln, MakeBundle
from tests.lora_files import peft_lora
from tests.tiny_pipelines import tiny_controlnet, tiny_sdxl

_LEVEL = 1.0
"""Of 255: what fp32 engines may differ by from eager fp32."""


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("controlnets")
    return (
        tiny_controlnet(folder / "one", tiny_model),
        tiny_controlnet(folder / "two", tiny_model, seed=4),
    )


@pytest.fixture(scope="module")
def controlled(bundle: MakeBundle, networks: tuple[Path, Path]) -> Path:
    return bundle("onnxruntime", controlnets=networks, lora=True)


@pytest.fixture(scope="module")
def hint() -> Image.Image:
    """A white square's outline."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[16:48, 16:48] = 255
    pixels[18:46, 18:46] = 0
    return Image.fromarray(pixels)


def _pixels(pipeline: Any, **given: Any) -> Any:
    import torch

    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a house",
        num_inference_steps=3,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="np",
        **given,
    ).images[0]
    return np.asarray(image, np.float64)


def _eager(name: str, model: Path, nets: list[Path]) -> Any:
    import diffusers
    import torch

    loaded = [diffusers.ControlNetModel.from_pretrained(net) for net in nets]
    return getattr(diffusers, name).from_pretrained(
        model,
        controlnet=loaded[0] if len(loaded) == 1 else loaded,
        safety_checker=None,
        dtype=torch.float32,
    )


def _assert_equal(found: Any, wanted: Any) -> None:
    assert np.abs(found - wanted).max() <= _LEVEL / 255


def test_one_network_draws_what_diffusers_draws_at_any_weight_and_range(
    controlled: Path, tiny_model: Path, networks: tuple[Path, Path], hint: Image.Image
) -> None:
    eager = _eager("StableDiffusionControlNetPipeline", tiny_model, [networks[1]])
    pipeline = runners.load(controlled, task="control", controlnets=["controlnet_2"])
    pictures = []
    for more in (
        {},
        {"controlnet_conditioning_scale": 0.4},
        {"control_guidance_start": 0.3, "control_guidance_end": 0.7},
        {"guess_mode": True},
    ):
        given = {"image": hint, "controlnet_conditioning_scale": 1.0, **more}
        pictures.append(_pixels(pipeline, **given))
        _assert_equal(pictures[-1], _pixels(eager, **given))
    for other in pictures[1:]:
        assert np.abs(other - pictures[0]).max() > 2 / 255, "a weight or range changes nothing"


def test_two_networks_at_once_and_a_size_that_is_not_native(
    controlled: Path, tiny_model: Path, networks: tuple[Path, Path], hint: Image.Image
) -> None:
    given = {
        "image": [hint.resize((80, 48)), hint.rotate(45).resize((80, 48))],
        "controlnet_conditioning_scale": [0.7, 1.2],
        "control_guidance_end": [1.0, 0.5],
        "width": 80,
        "height": 48,
    }
    found = _pixels(runners.load(controlled, task="control"), **given)
    eager = _eager("StableDiffusionControlNetPipeline", tiny_model, list(networks))
    _assert_equal(found, _pixels(eager, **given))


def test_changing_and_repainting_pictures_under_control(
    controlled: Path, tiny_model: Path, networks: tuple[Path, Path], hint: Image.Image
) -> None:
    start = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    tasks = {
        "control-img2img": ("StableDiffusionControlNetImg2ImgPipeline", {}),
        "control-inpaint": ("StableDiffusionControlNetInpaintPipeline", {"mask_image": hint}),
    }
    for task, (name, more) in tasks.items():
        given = {"image": start, "control_image": hint, "strength": 0.8, **more}
        found = _pixels(runners.load(controlled, task=task, controlnets=["controlnet"]), **given)
        _assert_equal(found, _pixels(_eager(name, tiny_model, [networks[0]]), **given))


def test_without_control_the_plain_class_draws_as_without_networks(
    controlled: Path, bundle: MakeBundle
) -> None:
    pipeline = runners.load(controlled)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    plain = _pixels(runners.load(bundle("onnxruntime")))
    np.testing.assert_array_equal(_pixels(pipeline), plain)
    for name in ("model.onnx", "model.onnx.data"):
        own = (controlled / "unet" / name).read_bytes()
        found = (bundle("onnxruntime") / "unet" / name).read_bytes()
        assert own[: len(found)] == found
        assert len(own) - len(found) < 20_000, "a form's constants come after the plain ones"
    form = pipeline.kiln.manifest.named("unet").forms["control"]
    assert form.files["weights"] == "unet/model.onnx.data", "the weights lie there twice"


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # in the text encoder, before
def test_a_lora_draws_under_control_and_goes_without_a_trace(
    controlled: Path,
    tiny_model: Path,
    networks: tuple[Path, Path],
    hint: Image.Image,
    tmp_path: Path,
) -> None:
    given = ("StableDiffusionControlNetPipeline", tiny_model, [networks[0]])
    file = peft_lora(_eager(*given), tmp_path / "a.safetensors", seed=1)
    eager = _eager(*given)
    pipeline = runners.load(controlled, task="control", controlnets=["controlnet"])
    before = _pixels(pipeline, image=hint)
    wanted = {"": _pixels(eager, image=hint)}
    for loaded in (pipeline, eager):
        loaded.load_lora_weights(file, adapter_name="a")
    wanted["a"] = _pixels(eager, image=hint)
    assert np.abs(wanted["a"] - wanted[""]).max() > 4 * _LEVEL / 255, "the LoRA does nothing"
    _assert_equal(_pixels(pipeline, image=hint), wanted["a"])
    assert pipeline.kiln.engine("unet", "control+lora").signature.free, "another graph has drawn"
    pipeline.unload_lora_weights()
    np.testing.assert_array_equal(_pixels(pipeline, image=hint), before)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "eager", "aoti", "aoti-blocks"])
def test_other_backends_draw_the_same(
    backend: str,
    bundle: MakeBundle,
    tiny_model: Path,
    networks: tuple[Path, Path],
    hint: Image.Image,
) -> None:
    made = bundle(backend, controlnets=networks)
    given = {"image": hint, "controlnet_conditioning_scale": 0.8}
    found = _pixels(runners.load(made, task="control", controlnets=["controlnet"]), **given)
    eager = _eager("StableDiffusionControlNetPipeline", tiny_model, [networks[0]])
    _assert_equal(found, _pixels(eager, **given))


@pytest.mark.slow
def test_sdxl_with_a_network(bundle: MakeBundle, tmp_path: Path, hint: Image.Image) -> None:
    model = tiny_sdxl(tmp_path / "sdxl")
    network = tiny_controlnet(tmp_path / "network", model)
    made = bundle("openvino", model=model, controlnets=(network,))
    for task, name, given in (
        ("control", "StableDiffusionXLControlNetPipeline", {"image": hint}),
        (
            "control-img2img",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            {"image": hint.rotate(20), "control_image": hint},
        ),
        (
            "control-inpaint",
            "StableDiffusionXLControlNetInpaintPipeline",
            {"image": hint.rotate(20), "control_image": hint, "mask_image": hint},
        ),
    ):
        found = _pixels(runners.load(made, task=task), **given)
        _assert_equal(found, _pixels(_eager(name, model, [network]), **given))


def test_the_command_makes_edges_fits_them_and_records_what_it_did(
    controlled: Path, tmp_path: Path, hint: Image.Image, kiln: Kiln
) -> None:
    photo, ready = tmp_path / "photo.png", tmp_path / "map.png"
    hint.resize((200, 100)).save(photo)
    hint.save(ready)
    out = tmp_path / "out.png"
    ended = kiln(
        *("generate", controlled, "--prompt", "a house", "--steps", 2, "--seed", 1, "-o", out),
        *("--control", f"controlnet_2={ready}:0.5", "--control", f"canny:{photo}:1.5:0-0.5"),
    )
    # the second one is for the second network by its place, which the first one has named
    assert ended.code == 2
    assert "given twice for controlnet_2" in ended.sentence
    ended = kiln(
        *("generate", controlled, "--prompt", "a house", "--steps", 2, "--seed", 1, "-o", out),
        *("--control", f"canny:{photo}:1.5:0-0.5", "--control", f"{ready}:0.5"),
    )
    assert ended.code == 0, ended.err
    assert "photo.png (200x100) is scaled and cut at its edges to 64x64" in ended.err
    first, second = read_metadata(out)["controls"]
    assert first["network"] == "controlnet"
    assert (first["preprocessor"], first["weight"], first["end"]) == ("canny", 1.5, 0.5)
    assert (second["file"], second["preprocessor"], second["weight"]) == ("map.png", None, 0.5)
    assert len(second["sha256"]) == 64
    with Image.open(out) as image:
        assert "ControlNet 1" in image.info["parameters"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["{map}:heavy"], "'heavy' for its weight, which is no number"),
        (["{map}:nan"], "'nan' for its weight, which is no number"),
        (["{map}:1:0.8-0.2"], "counts from 0.8 to 0.2"),
        (["{map}:1:0.2-1.2"], "counts from 0.2 to 1.2"),
        (["{map}:1:soon"], "'soon' for its range"),
        (["pose:{map}"], "before the file may stand canny:"),
        (["{text}"], "is not a picture that can be read"),
        (["{text}.png"], "can't be read"),
        (["{map}", "{map}", "{map}"], "has 2 control networks (controlnet, controlnet_2)"),
        (["controlnet_7={map}"], "the control network controlnet_7, and the bundle has"),
    ],
)
def test_wrong_controls_are_one_sentence(
    controlled: Path,
    tmp_path: Path,
    hint: Image.Image,
    kiln: Kiln,
    given: list[str],
    said: str,
) -> None:
    hint.save(tmp_path / "map.png")
    (tmp_path / "text").write_text("no picture")
    options = [
        part
        for text in given
        for part in ("--control", text.format(map=tmp_path / "map.png", text=tmp_path / "text"))
    ]
    ended = kiln("generate", controlled, "--prompt", "a house", "-o", tmp_path / "o.png", *options)
    assert ended.code == 2
    assert said in ended.sentence


def test_a_bundle_without_networks_says_how_to_get_them(
    bundle: MakeBundle, tmp_path: Path, hint: Image.Image, kiln: Kiln
) -> None:
    hint.save(tmp_path / "map.png")
    ended = kiln(
        *("generate", bundle("onnxruntime"), "--prompt", "a house", "-o", tmp_path / "o.png"),
        *("--control", tmp_path / "map.png"),
    )
    assert ended.code == 2
    assert "compile the model again with --controlnet" in ended.sentence
