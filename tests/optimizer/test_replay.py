"""Running again from a layer on gives what running all of it gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from optimizer.calls import Call
from optimizer.prepare import run_module
from optimizer.quantize.apply import quantizable_layers
from optimizer.replay import Replay
from runners.modules import WRAPPERS


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


@pytest.fixture(scope="module")
def call() -> Call:
    generator = np.random.default_rng(0)
    return Call(
        (
            generator.standard_normal((2, 4, 8, 8), dtype=np.float32),
            generator.standard_normal((2, 32), dtype=np.float32),
            generator.standard_normal((2, 5, 32), dtype=np.float32),
        ),
        (),
    )


def test_a_changed_layer_gives_what_a_whole_run_gives(
    unet: UNet2DConditionModel, call: Call
) -> None:
    wrapper = WRAPPERS["unet"](unet)
    replay = Replay(wrapper, unet, call)
    np.testing.assert_array_equal(replay.output, run_module(wrapper, call).outputs[0])
    layers = quantizable_layers(unet)
    assert len(layers) > 40
    for name, layer in layers.items():
        weight = layer.weight.data.clone()
        layer.weight.data.mul_(0.5)
        partly, wholly = replay.run_from(name), run_module(wrapper, call).outputs[0]
        layer.weight.data.copy_(weight)
        np.testing.assert_array_equal(partly, wholly, err_msg=name)
        assert not np.array_equal(partly, replay.output), name
    np.testing.assert_array_equal(run_module(wrapper, call).outputs[0], replay.output)


def test_what_comes_before_is_not_run_again(unet: UNet2DConditionModel, call: Call) -> None:
    replay = Replay(WRAPPERS["unet"](unet), unet, call)
    runs: list[str] = []
    handles = [
        block.register_forward_hook(lambda *_, name=name: runs.append(name))
        for name, block in unet.named_modules()
        if name in ("down_blocks.0.resnets.0", "mid_block.resnets.0", "up_blocks.1.resnets.0")
    ]
    replay.run_from("mid_block.resnets.0.conv1")
    assert runs == ["mid_block.resnets.0", "up_blocks.1.resnets.0"]
    for handle in handles:
        handle.remove()


class Twice(nn.Module):
    """One block that runs twice in a call."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.last(self.shared(self.shared(x))),)


def test_a_block_that_runs_twice_is_run() -> None:
    root = Twice()
    call = Call((np.ones((2, 3), dtype=np.float32),), ())
    replay = Replay(root, root, call)
    np.testing.assert_array_equal(replay.run_from("last"), replay.output)
    root.shared.weight.data.mul_(2)
    np.testing.assert_array_equal(replay.run_from("shared"), run_module(root, call).outputs[0])
