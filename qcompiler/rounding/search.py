"""Range search: scales for less than the whole range of a block, so that its bulk is finer.

=============  ==================================================================================
`none`         the whole range, as `nearest` has it
`mse`          where Σ |w - w'|^p is least, of ranges whose ends are drawn in step by step (QuaRot,
               Ashkboos et al. 2024: p = 2.4)
`output`       where Σ_j H_jj (w_j - w'_j)² is least: the output's error for independent inputs
`percentile`   what holds a share of the numbers
`entropy`      one share of their ranges for all blocks, where KL(histogram ‖ rounded histogram) of
               the numbers in units of their block's largest is least (Migacz 2017, TensorRT)
=============  ==================================================================================

Each block for itself. Where scales are rounded, the rounded ones are judged; what they are rounded
to is settled before, by the whole ranges. A codebook's numbers are always found by k-means.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcompiler.errors import BadInput
from qcompiler.formats import Grid, QFormat, QTensor
from qcompiler.formats.grid import block_range
from qcompiler.observers import Histogram
from qcompiler.ranges import entropy
from qcompiler.rounding.base import Layer, Need, Rounding
from qcompiler.rounding.folded import best_range, fold, round_folded, sides, with_range
from qcompiler.rounding.kmeans import codebook

By = Literal["none", "mse", "output", "percentile", "entropy"]
POWER = 2.4
SHARE = 0.999
SHARES = tuple(k / 50 for k in range(49, 9, -1))
"""Shares of the range that are tried after the whole."""
CHUNK = 2**18
"""Elements that are rounded at a time: what stays in a cache."""


@dataclass(frozen=True, kw_only=True)
class Search(Rounding):
    """Round to nearest with scales that are searched for."""

    name: ClassVar[str] = "search"

    by: By = "mse"
    """How ranges are judged."""
    power: float = POWER
    """The p of `mse`."""
    share: float = SHARE
    """Numbers of a block that `percentile` covers."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise BadInput(f"search: share is above 0 and at most 1, found {self.share}")
        if not self.power > 0:
            raise BadInput(f"search: power is above 0, found {self.power}")

    def needed(self) -> tuple[Need, ...]:
        return ("range",) if self.by == "output" else ()

    def layer(self, layer: Layer) -> QTensor:
        seen = layer.inputs.range
        if self.by == "output" and seen is None:
            raise BadInput(f"no calibration data reached {layer.id}; is it computed at all?")
        importance = None if seen is None else seen.square
        grid = fit(layer.weight, layer.format, self.by, importance, self.power, self.share)
        return grid.quantize(layer.weight.float())


def fit(
    weight: Tensor,
    fmt: QFormat,
    by: By = "mse",
    importance: Tensor | None = None,
    power: float = POWER,
    share: float = SHARE,
) -> Grid:
    """The grid for a matrix (out, in); `importance` (in,) is H_jj, the inputs' mean squares."""
    weight = weight.float()
    if fmt.is_codebook:
        return codebook(weight, fmt, None if by == "mse" else importance)
    grid = Grid.fit(weight, fmt)
    if by == "none" or fmt.unscaled:
        return grid
    if by == "percentile":
        return with_range(grid, *_percentile(weight, fmt, share))
    low, high = block_range(weight, fmt)
    x = fold(weight, fmt)
    if by == "entropy":
        down, up = _entropy(x, fmt)
        return with_range(grid, low * down, high * up)
    counts = torch.ones(weight.shape[1])
    if by == "output":
        counts, power = counts if importance is None else importance.float(), 2.0
    counts = fold(counts.expand(weight.shape), fmt)
    return best_range(grid, low, high, SHARES, lambda trial: _distance(trial, x, counts, power))


def _distance(grid: Grid, x: Tensor, counts: Tensor, power: float) -> Tensor:
    """Σ counts |x - x'|^power of each block."""
    step = max(CHUNK // x.shape[1], 1)
    scales, zeros = sides(grid)
    found = []
    for start in range(0, len(x), step):
        some = slice(start, start + step)
        zero = None if zeros is None else zeros[some]
        error = round_folded(x[some], scales[some], zero, grid.format).sub_(x[some]).abs_()
        error.pow_(power)
        found.append(error.mul_(counts[some]).sum(-1))
    return torch.cat(found)


def _percentile(weight: Tensor, fmt: QFormat, share: float) -> tuple[Tensor, Tensor]:
    """Ranges that leave out 1 - share of the numbers: the largest, or half of it at each end."""
    shape = fmt.scale_shape(tuple(weight.shape))
    inside = fold(torch.ones_like(weight), fmt).sum(-1, keepdim=True)
    outside = (1 - share) * inside / (1 if fmt.symmetric else 2)

    def cut(x: Tensor) -> Tensor:
        # Fillings are zeros, and so never among the largest.
        found = x.sort(-1, descending=True).values.gather(1, outside.long())
        return found.clamp_min(0).reshape(shape)

    x = fold(weight, fmt)
    if fmt.symmetric:
        return -cut(x.abs()), cut(x.abs())
    return -cut(-x), cut(x)


def _entropy(x: Tensor, fmt: QFormat) -> tuple[float, float]:
    """Shares of both ends at which the histogram of all blocks together changes least."""
    size = x.abs().amax(1, keepdim=True)
    met = (x / size)[(x != 0) & (size > 0)]
    if not len(met):
        return 1.0, 1.0
    low, high = entropy(Histogram.of(met[:, None]), replace(fmt, scale=None, block=None))
    if fmt.symmetric:  # one end reaches 1
        return high, high
    least, most = float(met.min()), float(met.max())
    return low / least if least < 0 else 1.0, high / most if most > 0 else 1.0
