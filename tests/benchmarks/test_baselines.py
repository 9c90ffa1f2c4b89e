"""The baselines are what their libraries do where nothing is trained: bitsandbytes' codes stand for
known weights, its int8 rounds the inputs too.

torchao isn't installed where tests run, because diffusers imports all of it while it is; the README
has what its rows were.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.baselines import change_linears
from optimizer.quantize import floats
from runners.bitsandbytes_layers import Nf4Layer
from runners.quantized import pack_int4


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(128, 64), nn.GELU(), nn.Sequential(nn.Linear(64, 96, bias=False))
    )


def nearest_int8(weight: Tensor) -> Tensor:
    """absmax of each row is code 127: an output channel's weights, or a token's values."""
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


def own_nf4(weight: Tensor) -> Tensor:
    found = floats.nf4(weight)
    packed, peaks = pack_int4(found["codes"]), found["scale"]
    layer = Nf4Layer(packed, peaks, tuple(weight.shape), bias=None, convolution=None)
    return layer(torch.eye(weight.shape[1])).T


@torch.no_grad()
def test_bitsandbytes_rounds_the_weights_of_every_linear_and_keeps_the_rest() -> None:
    x, plain = torch.randn(5, 128), model()

    def expected(nearest: Callable[[Tensor], Tensor], ends: Callable[[Tensor], Tensor]) -> Tensor:
        first, last = plain[0], plain[2][0]
        hidden = F.gelu(F.linear(ends(x), nearest(first.weight), first.bias))
        return F.linear(ends(hidden), nearest(last.weight))

    exact, nearest = plain(x), expected(nearest_int8, nearest_int8)
    int8, nf4 = model(), model()
    change_linears(int8, "bitsandbytes-int8")
    change_linears(nf4, "bitsandbytes-nf4")
    wanted = expected(own_nf4, lambda x: x)
    assert (nf4(x) - wanted).norm() / wanted.norm() < 0.01  # in bf16, where there is a kernel
    lost = (int8(x) - exact).norm() / (nearest - exact).norm()
    assert 0.8 < lost < 1.2, "not the nearest codes, but for those that flip as it reads fp16"
