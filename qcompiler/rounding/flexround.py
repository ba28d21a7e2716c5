"""FlexRound: rounding by learned division.

    W' = s₁ · round( W / (s₁ · S₂ · s₃) )        all positive; S₂ (out, in), s₃ (out, 1)

(Lee et al. 2023, FlexRound: learnable rounding based on element-wise division, eq. 2.) S₂ and s₃
start at 1, s₁ where nearest has its scales; logarithms are trained. The gradient of S₂ grows with
|W|, so that large weights may move by more than one step. Zero points stay; any format, of which
codebooks and formats without scales have no s₁ to learn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.formats import Grid, QTensor, spread
from qcompiler.rounding.ladder import Ladder
from qcompiler.rounding.learned import Learned, Student


@dataclass(frozen=True, kw_only=True)
class FlexRound(Learned):
    """Element-wise division before rounding, with the scales, trained by Adam."""

    name: ClassVar[str] = "flexround"

    @property
    def own_rate(self) -> float:
        """In all as far as from 1 to e."""
        return 2 / self.steps

    def student(self, weight: Tensor, grid: Grid) -> Student:
        return _Student(weight, grid)


class _Student(Student):
    def __init__(self, weight: Tensor, grid: Grid) -> None:
        self._weight, self._first = weight, grid
        self._shape = tuple(weight.shape)
        self._scale = grid.scale.log().requires_grad_()
        self._each = torch.zeros_like(weight).requires_grad_()
        self._row = weight.new_zeros(len(weight), 1).requires_grad_()
        self.leaves = (self._scale, self._each, self._row)

    def weight(self) -> Tensor:
        grid = self._grid()
        soft = self._scale.exp()
        scale = grid.scale + (soft - soft.detach())
        wide = spread(scale, self._shape, grid.format)
        return Ladder(grid, self._shape).through(self._divided(), None, wide)

    def rounded(self) -> QTensor:
        ladder = Ladder(self._grid(), self._shape)
        return ladder.hold(ladder.position(self._divided()).round().clamp(0, ladder.last))

    def _divided(self) -> Tensor:
        return self._weight * torch.exp(-self._each - self._row)

    def _grid(self) -> Grid:
        first = self._first
        if first.table is not None or first.format.unscaled:
            return first
        return replace(Grid.of(first.format, self._scale.detach().exp()), zero=first.zero)
