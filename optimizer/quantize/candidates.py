"""Which schemes `--quant auto` tries every layer with."""

from __future__ import annotations

from optimizer.backends import Backend
from optimizer.quantize.policy import legal_scheme
from optimizer.quantize.schemes import W4A16, W8A8, Scheme
from optimizer.sizes import LARGE

__all__ = ["candidates"]

_FINER = (W4A16(group=32), W4A16(group=32, rank=8), W4A16(group=32, rank=16))


def candidates(parameters: int, backend: Backend) -> tuple[Scheme, ...]:
    """8 bits with rounded inputs, which is fast, and 4 bits: plain, and in what costs more bytes.

    That is smaller groups and corrections of low rank; the budget decides where they pay. A large
    model is tried with the plain one only, to take less than half of the time.
    """
    finer = () if parameters > LARGE else _FINER
    tried: tuple[Scheme, ...] = (W8A8(), W4A16(), *finer)
    return tuple(legal_scheme(s, backend) for s in tried if s.format in backend.formats)
