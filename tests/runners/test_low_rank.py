"""Low-rank parts of convolutions as products, for compilers that take no kernel of any size."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from runners.low_rank import _convolved


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        (3, 1, 1, 1),
        (3, 2, 1, 1),
        (1, 1, 0, 1),
        (1, 2, 0, 1),
        (3, 1, 0, 1),
        (3, 2, 1, 2),
        (5, 1, 2, 1),
    ],
)
def test_a_convolution_is_the_sum_of_its_places_products(
    kernel: int, stride: int, padding: int, dilation: int
) -> None:
    torch.manual_seed(0)
    x, down = torch.randn(2, 6, 12, 9), torch.randn(6, 3, kernel, kernel)
    geometry = {
        name: 2 * [value] for name, value in zip(_NAMES, (stride, padding, dilation), strict=True)
    }
    wanted = F.conv2d(x, down.transpose(0, 1), **geometry)
    found = _convolved(x, down, geometry, wanted.shape[-2:])
    torch.testing.assert_close(found.permute(0, 3, 1, 2), wanted, rtol=1e-4, atol=1e-4)


_NAMES = ("stride", "padding", "dilation")
