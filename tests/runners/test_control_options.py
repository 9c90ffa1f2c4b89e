"""What --control says, and the maps that are made of pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from profiles.errors import SpecError
from runners.control_options import Control, parse_control
from runners.control_tasks import control_task, plain_task
from runners.images import open_image
from runners.preprocessing import canny, depth, map_of


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.png", Control(Path("a.png"))),
        ("a.png:0.5", Control(Path("a.png"), weight=0.5)),
        ("a.png:-1.5:0.25-1", Control(Path("a.png"), weight=-1.5, start=0.25)),
        ("canny:a b.png:2", Control(Path("a b.png"), "canny", 2.0)),
        ("controlnet_2=canny:a.png", Control(Path("a.png"), "canny", network="controlnet_2")),
        (r"canny:C:\maps\a.png:1:0-0.5", Control(Path(r"C:\maps\a.png"), "canny", end=0.5)),
        ("x=1.png", Control(Path("x=1.png"))),
        ("canny", Control(Path("canny"))),
    ],
)
def test_controls_are_read(text: str, wanted: Control) -> None:
    assert parse_control(text) == wanted


@pytest.mark.parametrize(
    "text",
    ["", ":1", "a.png:x", "a.png:inf", "a.png:1:2", "a.png:1:0.5-0.5", "a:1:0-1:2", "a.png:"],
)
def test_what_is_no_control_is_refused_with_the_way_to_write_it(text: str) -> None:
    with pytest.raises(SpecError, match="--control"):
        parse_control(text)


def test_tasks_are_the_plain_ones_with_control() -> None:
    for task in ("text-to-image", "img2img", "inpaint"):
        assert plain_task(control_task(task)) == task


def test_canny_draws_the_outline_of_a_square() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[8:24, 8:24] = 200
    edges = np.asarray(canny(Image.fromarray(pixels)))
    assert edges.shape == (32, 32, 3)
    assert set(np.unique(edges)) == {0, 255}
    assert edges[12:20, 6:10].any(axis=1).all(), "the left side isn't there"
    assert not edges[12:20, 12:20].any(), "the inside isn't empty"


@pytest.fixture(scope="module")
def estimator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Depth Anything of random weights."""
    import torch
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    folder = tmp_path_factory.mktemp("depth") / "estimator"
    backbone = Dinov2Config(
        image_size=28,
        patch_size=14,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
    )
    torch.manual_seed(3)
    network = DepthAnythingForDepthEstimation(config)
    for parameter in network.head.parameters():
        torch.nn.init.uniform_(parameter, 0.0, 1.0)  # else its last ReLU gives zeros
    network.save_pretrained(folder)
    DPTImageProcessorPil(
        size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(1).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_depth_is_what_the_estimator_predicts_over_its_own_range(
    estimator: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import pipeline

    monkeypatch.setenv("KILN_DEPTH_MODEL", str(estimator))
    control = parse_control(f"depth:{photo}:0.5")
    assert (control.model, control.weight) == (estimator, 0.5)
    picture = open_image(photo).picture
    found = np.asarray(map_of(control, picture), np.float64)
    assert found.shape == (50, 70, 3)
    assert (found.min(), found.max()) == (0, 255)
    theirs = pipeline("depth-estimation", model=str(estimator))(picture)["predicted_depth"].numpy()
    wanted = (theirs - theirs.min()) / (theirs.max() - theirs.min()) * 255
    assert np.abs(found[..., 0] - wanted).max() <= 1


def test_depth_without_an_estimator_says_how_to_give_one(
    estimator: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KILN_DEPTH_MODEL", raising=False)
    with pytest.raises(SpecError, match="--depth-model DIR"):
        parse_control(f"depth:{photo}")
    with pytest.raises(SpecError, match=r"no folder with a config\.json"):
        parse_control(f"depth:{photo}", tmp_path)
    shutil.copytree(estimator, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(SpecError, match="holds no depth estimator that transformers can read"):
        depth(open_image(photo).picture, tmp_path / "pickled")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(SpecError, match="holds no depth estimator that transformers can read"):
        depth(open_image(photo).picture, tmp_path)
