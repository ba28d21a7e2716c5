"""Which range a static activation format should cover: from a histogram of what was seen.

=============  ==================================================================================
`minmax`       all of it
`percentile`   all but one number in ten thousand
`mse`          where Σ (x - x')² is least, of ranges that shrink step by step
`entropy`      where KL(histogram ‖ rounded histogram) is least (Migacz 2017, TensorRT)
=============  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qcompiler.formats import Grid, QFormat
from qcompiler.observers import Histogram

OUTSIDE = 1e-4
"""Share of the numbers that `percentile` leaves outside."""
STEPS = 100
"""Ranges that are tried, from the whole to a hundredth of it."""
BINS = 2048
"""Bins of `entropy`, over the whole range."""


def percentile(seen: Histogram, fmt: QFormat) -> tuple[float, float]:
    """The range that leaves out half of `OUTSIDE` at each end."""
    values, counts = seen.values()
    share = counts.cumsum(0) / counts.sum()
    inside = (share > OUTSIDE / 2) & (share - counts / counts.sum() < 1 - OUTSIDE / 2)
    kept = values[inside]
    return float(kept.min()), float(kept.max())


def mse(seen: Histogram, fmt: QFormat) -> tuple[float, float]:
    """The range, of `STEPS`, whose grid is nearest to what was seen."""
    values, counts = seen.values()

    def loss(low: float, high: float) -> float:
        rounded = _grid(low, high, fmt).round(values)
        return float(((rounded - values).pow(2) * counts).sum())

    return _least(values, fmt, loss)


def entropy(seen: Histogram, fmt: QFormat) -> tuple[float, float]:
    """The range, of `STEPS`, in which rounding leaves the histogram most like itself.

    What a range cuts off counts as its ends; numbers of a bin that round to one code share their
    mass evenly.
    """
    values, counts = seen.values()
    low, high = float(values.min()), float(values.max())
    width = max(high - low, 1e-30) / BINS
    middles = low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * width
    places = ((values - low) / width).long().clamp(0, BINS - 1)
    bins = torch.zeros(BINS, dtype=torch.float64).index_add_(0, places, counts)

    def loss(low: float, high: float) -> float:
        inside = (middles >= low) & (middles <= high)
        p = bins[inside].clone()
        if len(p) < 2**fmt.bits:  # with a code for every bin, rounding could not be told
            return float("inf")
        p[0] += bins[middles < low].sum()
        p[-1] += bins[middles > high].sum()
        codes = _grid(low, high, fmt).codes(middles[inside]).long()
        codes -= codes.min()
        kept = bins[inside]
        mass = torch.zeros(int(codes.max()) + 1, dtype=torch.float64).index_add_(0, codes, kept)
        many = torch.zeros_like(mass).index_add_(0, codes, (kept > 0).double())
        q = torch.where(kept > 0, (mass / many.clamp_min(1))[codes], torch.zeros_like(kept))
        p, q = p / p.sum(), q / q.sum().clamp_min(1e-30)
        met = p > 0
        return float((p[met] * (p[met] / q[met].clamp_min(1e-12)).log()).sum())

    return _least(values, fmt, loss)


RANGES: Mapping[str, Callable[[Histogram, QFormat], tuple[float, float]]] = {
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}


def _least(
    values: Tensor, fmt: QFormat, loss: Callable[[float, float], float]
) -> tuple[float, float]:
    """The range with the least loss; with a zero point, one end is drawn in after the other."""
    shares = [k / STEPS for k in range(STEPS, 0, -1)]
    low, high = float(values.min()), float(values.max())
    if fmt.symmetric:
        top = max(-low, high)
        return min(((-k * top, k * top) for k in shares), key=lambda r: loss(*r))
    high = min((k * high for k in shares), key=lambda end: loss(low, end))
    return min((k * low for k in shares), key=lambda end: loss(end, high)), high


def _grid(low: float, high: float, fmt: QFormat) -> Grid:
    return Grid.cover(torch.tensor(low), torch.tensor(high), fmt)
