"""SignRound: an offset of each weight before it is rounded, and each block's range, by sign descent.

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

from qcompiler.formats import Grid, QFormat, QTensor, block_range, spread
from qcompiler.rounding.base import Layer
from qcompiler.rounding.ladder import Ladder
from qcompiler.rounding.learned import Learned, Student

LEAST = 0.1
"""Smallest share of a block's range."""


@dataclass(frozen=True, kw_only=True)
class SignRound(Learned):
    """Offsets before rounding and ranges, trained by the signs of gradients."""

    name: ClassVar[str] = "signround"
    signs: ClassVar[bool] = True

    rate: float = 0.0
    """Step size at first; 0 is 1/steps."""

    def student(self, layer: Layer) -> Student:
        return _Student(layer.weight, layer.format)


class _Student(Student):
    def __init__(self, weight: Tensor, fmt: QFormat) -> None:
        self._weight, self._format = weight, fmt
        self._low, self._high = block_range(weight, fmt)
        self._offset = torch.zeros_like(weight).requires_grad_()
        self._shares = tuple(torch.ones_like(self._low).requires_grad_() for _ in range(2))
        self.leaves = (self._offset, *self._shares)

    def weight(self) -> Tensor:
        grid = self._grid()
        ladder = Ladder(grid, tuple(self._weight.shape))
        if grid.table is not None or self._format.unscaled:
            one = torch.ones(())
            return ladder.through(self._weight, self._offset, one)
        scale, zero = self._soft(grid)
        shape = tuple(self._weight.shape)
        wide = spread(scale, shape, self._format)
        shift = None if zero is None else spread(zero, shape, self._format)
        return ladder.through(self._weight, self._offset, wide, shift)

    def rounded(self) -> QTensor:
        ladder = Ladder(self._grid(), tuple(self._weight.shape))
        place = ladder.position(self._weight) + self._offset
        return ladder.hold(place.round().clamp(0, ladder.last))

    def settle(self) -> None:
        with torch.no_grad():
            self._offset.clamp_(-0.5, 0.5)
            for share in self._shares:
                share.clamp_(LEAST, 1)

    def _range(self) -> tuple[Tensor, Tensor]:
        if self._format.is_codebook:
            return self._low, self._high
        return self._low * self._shares[0], self._high * self._shares[1]

    def _grid(self) -> Grid:
        with torch.no_grad():
            return Grid.cover(*self._range(), self._format)

    def _soft(self, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point with the values of `grid` and the gradients of their formulas."""
        fmt = self._format
        low, high = self._range()
        if grid.zero is None:
            scale = torch.maximum(low.abs(), high.abs()) / fmt.top
            return grid.scale + (scale - scale.detach()), None
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (fmt.qmax - fmt.qmin)
        scale = grid.scale + (scale - scale.detach())
        zero = fmt.qmin - low / scale
        return scale, grid.zero + (zero - zero.detach())
