from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optimizer.quantize.observe import LayerStatistics, observing, output_of
from optimizer.quantize.ranges import ActivationRange, best_range

BINS = 2048


def statistics(*batches: Tensor, channel_axis: int = -1) -> LayerStatistics:
    found = LayerStatistics()
    for batch in batches:
        found.add(batch, channel_axis)
    return found


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_doubling_the_range_keeps_every_count() -> None:
    batches = [normal(40, 8, seed=i, scale=2.0**i) for i in range(6)]
    found = statistics(*batches)
    assert found.histogram.sum() == 6 * 40 * 8
    assert found.histogram.numel() == BINS
    assert found.limit >= float(torch.cat(batches).abs().max())


def test_the_histogram_after_doubling_is_the_histogram_of_all_values() -> None:
    """Bins double in width, so counts land where one histogram over the final range puts them."""
    batches = [normal(500, 4, seed=i, scale=3.0**i) for i in range(4)]
    found = statistics(*batches)
    direct = torch.histc(torch.cat(batches), BINS, -found.limit, found.limit).double()
    # a value on the edge of a bin may fall on either side of it, by the rounding of its division
    moved = float((found.histogram.cumsum(0) - direct.cumsum(0)).abs().max())
    assert moved <= 4


@pytest.mark.parametrize(("shape", "axis"), [((3, 7, 5), -1), ((2, 5, 4, 6), 1)])
def test_energy_is_the_mean_square_of_each_channel(shape: tuple[int, ...], axis: int) -> None:
    x = normal(*shape)
    found = statistics(x, 2 * x, channel_axis=axis)
    channels = x.movedim(axis, -1).flatten(0, -2)
    torch.testing.assert_close(found.channel_power, 2.5 * channels.square().mean(0))


def test_statistics_round_trip_as_tensors() -> None:
    found = statistics(normal(9, 5), normal(9, 5, scale=100))
    again = LayerStatistics.from_state(found.state())
    assert (again.limit, again.count) == (found.limit, found.count)
    assert torch.equal(again.histogram, found.histogram)
    assert torch.equal(again.channel_power, found.channel_power)


def test_a_layer_that_was_never_called_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="never called"):
        LayerStatistics().state()


class Projections(nn.Module):
    """Queries read `x`, keys and values `y`: in the first call `z`, where it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor, z: Tensor | None = None) -> None:
        self.q(x)
        self.k(y)
        self.v(y if z is None else z)


@pytest.mark.parametrize("first", ["same", "another"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_layers_that_read_the_same_input_have_what_each_would_have_alone(
    first: str, context: type[torch.no_grad], monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[LayerStatistics] = []
    add = LayerStatistics.add

    def noted(self: LayerStatistics, x: Tensor, axis: int) -> None:
        added.append(self)
        add(self, x, axis)

    monkeypatch.setattr(LayerStatistics, "add", noted)
    with context():
        calls = [(normal(2, 40, 6, seed=i), normal(2, 90, 6, seed=9 - i)) for i in range(5)]
        root, other = Projections(), normal(2, 40, 6, seed=77)
        with observing(root, ["q", "k", "v"]) as found:
            for number, (x, y) in enumerate(calls):
                root(x, y, other if number == 0 and first == "another" else None)
        values = [y for _, y in calls]
        if first == "another":
            values[0] = other
        shared = first == "same" and context is torch.no_grad
        assert sum(one is found["v"] for one in added) == (0 if shared else 5)
        for name, inputs in (("q", [x for x, _ in calls]), ("k", [y for _, y in calls])):
            assert_same(found[name], statistics(*inputs))
        assert_same(found["v"], statistics(*values))


def test_an_input_that_changed_in_place_is_counted_anew() -> None:
    root, x = Projections(), normal(20, 6)
    with torch.no_grad(), observing(root, ["q", "k"]) as found:
        root.q(x)
        root.k(x.mul_(3))
    assert found["k"].peak > 2 * found["q"].peak


def assert_same(one: LayerStatistics, other: LayerStatistics) -> None:
    for (name, x), y in zip(one.state().items(), other.state().values(), strict=True):
        assert torch.equal(x, y), name


def drawn(kind: str) -> Tensor:
    x = normal(200, 64)
    if kind == "outliers":
        x[0, :4] *= 40
    elif kind == "uniform":
        x = torch.rand((200, 64), generator=torch.Generator().manual_seed(0))
    elif kind == "relu":
        x = x.relu()
    elif kind == "silu":
        x = nn.functional.silu(2 * x)
    return x


def loss(x: Tensor, grid: ActivationRange) -> float:
    zero = grid.zero_point
    low, high, shift = (-128, 127, 0) if zero is None else (0, 255, zero)
    values = x.numpy().astype(np.float64)  # numpy: thousands of small calls need no threads
    codes = np.clip(np.round(values / grid.scale) + shift, low, high)
    return float(np.square((codes - shift) * grid.scale - values).sum())


def brute_force(x: Tensor, *, affine: bool) -> float:
    """The least loss over a fine raster of clips (and zero points)."""
    peak = float(x.abs().max())
    best = min(loss(x, ActivationRange(peak * i / 200 / 127, None)) for i in range(10, 201))
    if not affine:
        return best
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    for i in range(20, 101, 4):
        for j in range(20, 101, 4):
            scale = (high * i - low * j) / 100 / 255
            best = min(best, loss(x, ActivationRange(scale, round(-low * j / 100 / scale))))
    return best


@pytest.mark.parametrize("kind", ["normal", "outliers", "uniform", "relu"])
def test_the_best_symmetric_grid_is_nearly_as_good_as_brute_force(kind: str) -> None:
    """Within 5 %: candidates are 1 % of the peak apart, and rounding is modelled as uniform.

    (SiLU's values crowd at its minimum, in less than a step: the model doesn't hold for them.)
    """
    x = drawn(kind)
    grid = best_range(statistics(x), affine=False)
    assert grid.zero_point is None
    assert loss(x, grid) <= 1.05 * brute_force(x, affine=False)


@pytest.mark.parametrize("kind", ["normal", "outliers", "uniform", "relu", "silu"])
def test_the_best_grid_with_a_zero_point_is_nearly_as_good_as_brute_force(kind: str) -> None:
    """Within 20 %: a zero point must pay a tenth before it is taken, the rest is the raster."""
    x = drawn(kind)
    grid = best_range(statistics(x), affine=True)
    assert loss(x, grid) <= 1.2 * brute_force(x, affine=True)


def test_a_zero_point_is_taken_where_half_of_the_grid_would_stay_empty() -> None:
    """A grid of 255 steps over one side has half the step, a quarter of the error."""
    for kind in ("relu", "silu", "uniform"):
        x = drawn(kind)
        affine, symmetric = (best_range(statistics(x), affine=wish) for wish in (True, False))
        assert affine.zero_point is not None
        assert 0 <= affine.zero_point <= 255
        assert loss(x, affine) < 0.5 * loss(x, symmetric)


def test_around_zero_a_grid_stays_symmetric() -> None:
    assert best_range(statistics(normal(200, 64)), affine=True).zero_point is None


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_a_constant_input_has_a_grid_that_holds_it(value: float, affine: bool) -> None:
    x = torch.full((3, 4), value)
    grid = best_range(statistics(x), affine=affine)
    assert grid.scale > 0
    assert loss(x, grid) <= 12 * (0.01 * value) ** 2


def test_observing_sees_what_each_layer_is_given_and_stops_afterwards() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Linear(6, 2))
    x = normal(2, 3, 2, 3)
    with observing(model, ["0", "2"]) as found:
        model(x)
        model(x)
    model(x)
    assert found["0"].count == 2 * 2 * 6
    assert found["2"].count == 2 * 2 * 4
    torch.testing.assert_close(found["0"].channel_power, x.square().mean((0, 2, 3)))
    assert not model[0]._forward_pre_hooks


def test_outputs_are_observed_where_a_pattern_asks() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    x = normal(5, 6)
    with torch.no_grad(), observing(model, ["0", "1"], ["1", "other.*"]) as found:
        y = model(x)
    assert sorted(found) == ["0", "1", output_of("1")]
    torch.testing.assert_close(found[output_of("1")].channel_power, y.square().mean(0))
    assert not model[1]._forward_hooks


def test_peaks_and_sample_are_of_every_channel_and_bounded() -> None:
    """The sample is spread over all calls: the last half of them has its share."""
    batches = [normal(70, 6, seed=i) + i for i in range(300)]
    found = statistics(*batches)
    torch.testing.assert_close(found.peaks, torch.cat(batches).abs().amax(0))
    assert 512 <= len(found.sample) <= 1024
    assert found.sample.shape[1] == 6
    late = (found.sample.float().mean(1) > 150).float().mean()
    assert 0.4 < late < 0.6


def test_the_largest_values_are_kept_beside_the_sample() -> None:
    """One place in 9,000 is 100 times as large: each place stands for itself, the rest for many."""
    batches = [normal(90, 6, seed=i) for i in range(100)]
    batches[33][44] *= 100
    found = statistics(*batches)
    values, counts = found.typical
    assert len(found.extremes) == 128
    torch.testing.assert_close(found.extremes[0].float(), batches[33][44], rtol=1e-3, atol=1e-2)
    assert counts.sum() == pytest.approx(9000)
    assert counts[-1] == 1
    energy = (counts[:, None] * values.square()).sum(0) / counts.sum()
    torch.testing.assert_close(energy, found.channel_power, rtol=0.25, atol=0.0)


def test_values_beyond_fp16_stay_finite() -> None:
    found = statistics(normal(90, 6) * 1e6)
    assert bool(torch.isfinite(found.typical[0]).all())
    assert found.peak > 1e6


def test_what_goes_on_from_a_state_ends_as_what_was_never_interrupted() -> None:
    batches = [normal(70, 6, seed=i) for i in range(90)]
    whole = statistics(*batches)
    resumed = LayerStatistics.from_state(statistics(*batches[:41]).state())
    for batch in batches[41:]:
        resumed.add(batch, -1)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name


class Skipping(nn.Module):
    """A convolution of a concatenation, and one of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(5, 2, 1)
        self.plain = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        joined = torch.cat([x, skip], dim=1)
        return self.shortcut(joined.contiguous()) + self.plain(torch.cat([x, x])[:2] + 1)


def test_the_parts_of_a_concatenated_input_are_seen() -> None:
    model = Skipping()
    with torch.no_grad(), observing(model, ["shortcut", "plain"]) as found:
        model(normal(2, 3, 4, 4), normal(2, 2, 4, 4))
    assert found["shortcut"].parts == (3, 2)
    assert found["plain"].parts == ()
    assert LayerStatistics.from_state(found["shortcut"].state()).parts == (3, 2)
