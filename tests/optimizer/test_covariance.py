"""Covariances are those of what a weight's columns are multiplied with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from optimizer.quantize.covariance import Covariance, in_passes, observing_covariance
from optimizer.quantize.solvers.grid import as_matrix


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def output_power(layer: nn.Linear | nn.Conv2d, covariance: Tensor) -> Tensor:
    """The mean square of each output, without bias, that the covariance predicts."""
    matrix = as_matrix(layer.weight.detach())
    return ((matrix @ covariance) * matrix).sum(1)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4, bias=False),
        nn.Conv2d(6, 4, 1, bias=False),
        nn.Conv2d(6, 4, 3, padding=1, bias=False),
        nn.Conv2d(6, 4, 3, stride=2, bias=False),
    ],
    ids=["linear", "1x1", "3x3", "strided"],
)
def test_a_covariance_predicts_the_power_of_the_layers_outputs(
    layer: nn.Linear | nn.Conv2d,
) -> None:
    root = nn.ModuleDict({"layer": layer})
    x = normal(2, 7, 6) if isinstance(layer, nn.Linear) else normal(2, 6, 7, 5)
    with torch.no_grad(), observing_covariance(root, ["layer"]) as found:
        y = torch.cat([layer(x), layer(2 * x)])
    axes = (0, 1) if isinstance(layer, nn.Linear) else (0, 2, 3)
    torch.testing.assert_close(
        output_power(layer, found["layer"].mean), y.square().mean(axes), rtol=1e-4, atol=1e-6
    )
    assert not layer._forward_pre_hooks


def test_a_wide_patch_has_the_covariance_of_its_channels() -> None:
    layer = nn.Conv2d(300, 4, 3, padding=1)
    found = Covariance()
    x = normal(2, 300, 4, 4)
    found.add(x, layer)
    rows = x.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(found.mean, rows.T @ rows / len(rows))


def test_of_a_large_input_evenly_spread_positions_count() -> None:
    found = Covariance()
    x = normal(1, 5000, 8)
    found.add(x, nn.Linear(8, 2))
    assert 256 < found.count <= 512
    torch.testing.assert_close(found.mean, torch.eye(8), atol=0.3, rtol=0)


def test_a_layer_that_was_never_called_has_none() -> None:
    with pytest.raises(ValueError, match="never called"):
        _ = Covariance().mean


def test_passes_hold_all_layers_in_order_within_the_room() -> None:
    layers = {
        "small": nn.Linear(4, 9),  # 64 bytes
        "patch": nn.Conv2d(2, 9, 2),  # 8 columns: 256
        "pixel": nn.Conv2d(8, 9, 1),  # 256
        "wide": nn.Conv2d(512, 9, 3),  # by channels: 1 MiB
    }
    assert in_passes(layers, 2**30) == [["small", "patch", "pixel", "wide"]]
    assert in_passes(layers, 512) == [["small", "patch"], ["pixel"], ["wide"]]


def test_what_passes_count_is_what_covariances_take() -> None:
    layers = {"linear": nn.Linear(6, 4), "patch": nn.Conv2d(6, 4, 3), "wide": nn.Conv2d(512, 4, 3)}
    for name, layer in layers.items():
        found = Covariance()
        x = normal(2, 5, 6) if isinstance(layer, nn.Linear) else normal(1, layer.in_channels, 5, 5)
        found.add(x, layer)
        needed = 4 * found.finished().numel()
        assert in_passes({"a": layer, "b": layer}, 2 * needed) == [["a", "b"]], name
        assert in_passes({"a": layer, "b": layer}, 2 * needed - 1) == [["a"], ["b"]], name
