"""SmoothQuant: what the multipliers win, where they are shared and where none is worth it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from optimizer.quantize import apply
from optimizer.quantize.apply import quantized_layer, quantized_layers
from optimizer.quantize.observe import LayerStatistics, observing
from optimizer.quantize.schemes import KEEP, W4A16, W8A8, W8A16, Scheme
from optimizer.quantize.smoothing import smoothing
from runners.quantized import insert_quantized


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outliers(*shape: int, seed: int = 0) -> Tensor:
    """Every eighth channel (the last axis) is 40 times as large, as LLM.int8 found them."""
    x = normal(*shape, seed=seed)
    x[..., ::8] *= 40
    return x


def statistics(x: Tensor, axis: int = -1, parts: tuple[int, ...] = ()) -> LayerStatistics:
    found = LayerStatistics()
    found.add(x, axis)
    found.parts = parts
    return found


def relative_error(given: Tensor, wanted: Tensor) -> float:
    return float((given - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_outlier_channels_lose_at_least_6_db_less(kind: str) -> None:
    """Seven of eight channels would have 3 steps of the grid; smoothed, they have most of them."""
    torch.manual_seed(0)
    x = outliers(4, 10, 10, 64)
    layer: nn.Linear | nn.Conv2d = nn.Linear(64, 32)
    axis = -1
    if kind == "convolution":
        layer, axis, x = nn.Conv2d(64, 32, 3, padding=1), 1, x.movedim(-1, 1)
    with torch.no_grad():
        layer.weight[:, ::8] /= 40  # a trained layer's inputs matter alike
    found = {"0": statistics(x, axis)}
    test = outliers(4, 10, 10, 64, seed=1)
    test = test.movedim(-1, 1) if kind == "convolution" else test
    with torch.no_grad():
        wanted = layer(test)
        plain, smooth = (
            quantized_layer("0", layer, W8A8(), found, solver) for solver in ("mse", "smoothquant")
        )
        assert plain.multiplier is None
        assert smooth.multiplier is not None
        errors = [relative_error(made(test), wanted) for made in (plain, smooth)]
    assert errors[1] < 0.25 * errors[0]


def test_multipliers_are_powers_of_two() -> None:
    """So that no floating-point type loses anything by them."""
    found = smoothing([normal(8, 64)], statistics(outliers(500, 64)), affine=True, by_channel=True)
    assert found is not None
    mantissas, _ = torch.frexp(found.multiplier)
    assert torch.all(mantissas == 0.5)
    assert found.multiplier[0] < found.multiplier[1]


def test_an_even_input_stays_as_it_is() -> None:
    found = statistics(normal(500, 64))
    assert smoothing([normal(8, 64)], found, affine=True, by_channel=True) is None


def test_a_concatenation_gets_a_range_for_each_part_with_any_solver() -> None:
    """A skip connection 30 times as large as what it joins."""
    x = torch.cat([normal(2, 24, 8, 8), 30 * normal(2, 8, 8, 8, seed=1)], dim=1)
    layer = nn.Conv2d(32, 16, 1)
    with torch.no_grad():
        layer.weight[:, 24:] /= 30
    found = {"0": statistics(x, 1, (24, 8))}
    with torch.no_grad():
        split = quantized_layer("0", layer, W8A8(), found, "mse")
        found["0"].parts = ()
        whole = quantized_layer("0", layer, W8A8(), found, "mse")
        errors = [relative_error(made(x), layer(x)) for made in (whole, split)]
    assert split.multiplier is not None
    assert whole.multiplier is None
    assert len(split.multiplier[:24].unique()) == len(split.multiplier[24:].unique()) == 1
    assert errors[1] < 0.25 * errors[0]


class Block(nn.Module):
    """A norm that feeds three layers, one of them no W8A8; a fourth has an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.out(self.q(y) * self.k(y) + self.v(y))


def test_layers_with_one_input_share_their_multiplier() -> None:
    """Then engines multiply and round it once."""
    torch.manual_seed(1)
    root = Block()
    with torch.no_grad():
        root.norm.weight[::8] = 50.0
        x = normal(40, 32)
        with observing(root, ["q", "k", "v", "out"]) as found:
            root(x)
        schemes: dict[str, Scheme] = {"q": W8A8(), "k": W8A8(), "v": W8A16(), "out": W8A8()}
        layers = quantized_layers(root, schemes, found, "smoothquant")
        insert_quantized(root, layers)
    q, k, v = (layers[name] for name in "qkv")
    assert q.multiplier is not None
    assert k.multiplier is not None
    assert torch.equal(q.multiplier, k.multiplier)
    assert q.activation_scale is not None
    assert q.activation_scale == k.activation_scale
    assert v.multiplier is None


class Transformer(nn.Module):
    """diffusers' own attention and gated feed-forward part, with outlier channels inside both."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.attention import FeedForward
        from diffusers.models.attention_processor import Attention

        torch.manual_seed(0)
        self.attn = Attention(query_dim=64, heads=4, dim_head=16)
        self.ff = FeedForward(64, activation_fn="geglu")
        with torch.no_grad():
            for producer, reader in (
                (self.attn.to_v, self.attn.to_out[0]),
                (self.ff.net[0].proj, self.ff.net[2]),
            ):
                producer.weight[: reader.in_features : 8] *= 50  # of GEGLU, values' rows only
                reader.weight[:, ::8] /= 50

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ff(self.attn(x))
        return out


READERS = ("attn.to_out.0", "ff.net.2")


@pytest.mark.parametrize("producer", [W8A8(), W4A16(group=32), KEEP], ids=lambda s: s.label)
def test_multipliers_go_into_the_layer_that_makes_the_input(
    producer: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and GEGLU's first half, quantized or not; the numbers are those of a product."""
    x, outputs = normal(2, 30, 64), []
    for folds in (True, False):
        root = Transformer()
        with torch.no_grad(), observing(root, (*READERS, *PRODUCERS)) as found:
            root(x)
        schemes = {**dict.fromkeys(PRODUCERS, producer), **dict.fromkeys(READERS, W8A8())}
        planned = {name: scheme for name, scheme in schemes.items() if scheme.bits < 16}
        if not folds:
            monkeypatch.setattr(apply, "gains", lambda *_: {})
        layers = quantized_layers(root, planned, found, "smoothquant")
        assert all((layers[name].multiplier is None) == folds for name in READERS)
        insert_quantized(root, layers)
        with torch.no_grad():
            outputs.append(root(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


PRODUCERS = ("attn.to_v", "ff.net.0.proj")


def test_a_producer_whose_output_is_rounded_stays_as_it_is() -> None:
    root = Transformer()
    with (
        torch.no_grad(),
        observing(root, (*READERS, *PRODUCERS), PRODUCERS) as found,
    ):
        root(normal(2, 30, 64))
    schemes = {**dict.fromkeys(PRODUCERS, W8A8(output=True)), **dict.fromkeys(READERS, W8A8())}
    layers = quantized_layers(root, schemes, found, "smoothquant")
    assert all(layers[name].multiplier is not None for name in READERS)
