"""SignRound: offsets of weights before they are rounded, and ranges, by the signs of gradients.

    W' = s · (clamp(round(W/s + z + V), qmin, qmax) - z)        V ∈ [-½, ½]
    s = (β max W - α min W) / (qmax - qmin)                     α, β ∈ (0, 1]

(Cheng et al. 2024, Optimize weight rounding via signed gradient descent, eq. 3 and 5; signed steps
of 1/steps, falling to zero linearly, the best iterate kept.) Any format: where numbers are not
evenly spaced, V is a share of the distance between two neighbours. A codebook's table stays as it
is, and only V is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.formats import Grid, QTensor, spread
from qcompiler.rounding.ladder import Ladder
from qcompiler.rounding.learned import Learned, Student

LEAST = 0.1
"""Smallest share of a block's range."""


@dataclass(frozen=True, kw_only=True)
class SignRound(Learned):
    """Offsets before rounding and ranges, trained by the signs of gradients."""

    name: ClassVar[str] = "signround"
    signs: ClassVar[bool] = True

    @property
    def own_rate(self) -> float:
        """As far as from one end of V to its middle, in all."""
        return 1 / self.steps

    def student(self, weight: Tensor, grid: Grid) -> Student:
        return _Student(weight, grid)


class _Student(Student):
    bounds = ((-0.5, 0.5), (LEAST, 1.0), (LEAST, 1.0))

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        self._weight, self._first, self._format = weight, grid, grid.format
        self._low, self._high = covered(grid)
        self._offset = torch.zeros_like(weight).requires_grad_()
        self._shares = tuple(torch.ones_like(self._low).requires_grad_() for _ in range(2))
        self.leaves = (self._offset, *self._shares)

    def weight(self) -> Tensor:
        grid, shape = self._grid(), tuple(self._weight.shape)
        ladder = Ladder(grid, shape)
        if grid is self._first:
            return ladder.through(self._weight, self._offset, torch.ones(()))
        scale, zero = self._soft(grid)
        wide = spread(scale, shape, self._format)
        shift = None if zero is None else spread(zero, shape, self._format)
        return ladder.through(self._weight, self._offset, wide, shift)

    def rounded(self) -> QTensor:
        ladder = Ladder(self._grid(), tuple(self._weight.shape))
        place = ladder.position(self._weight) + self._offset
        return ladder.hold(place.round().clamp(0, ladder.last))

    def _range(self) -> tuple[Tensor, Tensor]:
        return self._low * self._shares[0], self._high * self._shares[1]

    def _grid(self) -> Grid:
        if self._first.table is not None or self._format.unscaled:
            return self._first
        with torch.no_grad():
            return Grid.cover(*self._range(), self._format)

    def _soft(self, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point with the values of `grid` and the gradients of their formulas."""
        fmt = self._format
        low, high = self._range()
        if grid.zero is None:
            scale = torch.maximum(low.abs(), high.abs()) / fmt.top
            scale = scale.copysign(grid.scale)
            return grid.scale + (scale - scale.detach()), None
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (fmt.qmax - fmt.qmin)
        scale = grid.scale + (scale - scale.detach())
        zero = fmt.qmin - low / scale
        return scale, grid.zero + (zero - zero.detach())


def covered(grid: Grid) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number of each block that its scale was made for."""
    fmt = grid.format
    if grid.zero is None:
        size = grid.scale.abs() * fmt.top
        if fmt.mirrored:  # only one end is the extreme; the other is a step nearer
            ends = grid.scale * fmt.qmin, grid.scale * fmt.qmax
            return torch.minimum(*ends), torch.maximum(*ends)
        return -size, size
    return grid.scale * (fmt.qmin - grid.zero), grid.scale * (fmt.qmax - grid.zero)
