"""Elements that are a fixed list of numbers: normal quantiles, powers of two, companded scales.

The companding of `twinlog` and `tan` follows the idea of LRQ-DiT's twin-log and DopQ-ViT's tan
quantizer (levels where long-tailed weights, and probabilities near 1, lie); the constants are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.formats.base import Element

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""As published (QLoRA, appendix E): the formula gives them but for the last bit."""
NF_OFFSET = 0.9677083
"""Quantile at which the ends of `nf` lie: (1 - 1/32 + 1 - 1/30) / 2."""


@dataclass(frozen=True)
class Levels(Element):
    """A fixed list of numbers in rising order, with the bounds at which rounding changes."""

    levels: tuple[float, ...]
    bounds: tuple[float, ...] | None = None
    """One fewer than the levels; None are the middles."""

    @property
    def bits(self) -> int:  # type: ignore[override]
        return (len(self.levels) - 1).bit_length()

    @property
    def top(self) -> float:  # type: ignore[override]
        return max(map(abs, self.levels))

    @property
    def one_sided(self) -> bool:  # type: ignore[override]
        return self.levels[0] >= 0

    def encode(self, u: Tensor) -> Tensor:
        levels = torch.tensor(self.levels, dtype=u.dtype, device=u.device)
        bounds = (
            (levels[1:] + levels[:-1]) / 2
            if self.bounds is None
            else torch.tensor(self.bounds, dtype=u.dtype, device=u.device)
        )
        return torch.bucketize(u.contiguous(), bounds)

    def decode(self, codes: Tensor) -> Tensor:
        spare = [torch.nan] * (2**self.bits - len(self.levels))
        levels = torch.tensor([*self.levels, *spare], dtype=torch.float32, device=codes.device)
        return levels[codes.long()]


def normal_float(bits: int) -> Element:
    """Quantiles of N(0, 1) over [-1, 1], a zero, one positive number more than negative ones."""
    if bits == 4:
        return Levels(NF4)
    half = 2 ** (bits - 1)
    up = torch.special.ndtri(torch.linspace(NF_OFFSET, 0.5, half + 1, dtype=torch.float64)[:-1])
    down = -torch.special.ndtri(torch.linspace(NF_OFFSET, 0.5, half, dtype=torch.float64)[:-1])
    found = torch.cat([down, torch.zeros(1, dtype=torch.float64), up]).sort().values
    return Levels(tuple((found / found.abs().max()).float().tolist()))


def power_of_two(bits: int) -> Element:
    """0 and ±2^-k, k = 0 … 2^(bits-1) - 2: a product with one is a shift."""
    up = [2.0**-k for k in range(2 ** (bits - 1) - 1)]
    return Levels(tuple(sorted([0.0, *up, *(-v for v in up)])))


def log(bits: int) -> Element:
    """2^-k, rounded by exponent: k = round(-log₂ u). There is no zero."""
    powers = range(2**bits - 1, -1, -1)
    bounds = tuple(2.0 ** -(k - 0.5) for k in powers if k > 0)
    return Levels(tuple(2.0**-k for k in powers), bounds)


def twin_log(bits: int) -> Element:
    """±(2^(6 i/n) - 1) / 63, i = 0 … n: steps grow sixty-fold from zero to the tail."""
    n = 2 ** (bits - 1) - 1
    up = [(2.0 ** (6 * i / n) - 1) / 63 for i in range(1, n + 1)]
    return Levels(tuple([-v for v in reversed(up)] + [0.0] + up))


def tan(bits: int) -> Element:
    """1 - tan(¾ (1 - i/n)) / tan ¾, i = 0 … n: steps shrink from 0 towards 1."""
    n = 2**bits - 1
    return Levels(tuple(1 - math.tan(0.75 * (1 - i / n)) / math.tan(0.75) for i in range(n + 1)))


def mid(bits: int) -> Element:
    """±½, ±1½, …: balanced, without a zero."""
    return Levels(tuple(i - (2**bits - 1) / 2 for i in range(2**bits)))


BINARY = Levels((-1.0, 1.0))
