"""GPTQ: round column by column, and let the columns that follow make up for the error.

    H + λ I = Kᵀ K,  K lower triangular
    tr(E H Eᵀ) = Σ_j K_jj² ‖ e_j + Σ_{k<j} (K_jk / K_jj) e_k ‖²,     E = W - W'
    q_j = Q( w_j + Σ_{k<j} (K_jk / K_jj) e_k )

(Frantar et al. 2023, algorithm 1, in the form of Chee et al. 2023, theorem 1: the triangle of H
itself gives the same numbers as that of its inverse, for one factorization instead of three.)
Columns go by falling diagonal of H, on a grid that is fitted before (static groups), so that
storage knows nothing of the order. A column that no input reaches is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.errors import BadInput
from qcompiler.formats import Grid, QTensor
from qcompiler.rounding.base import Layer, Need, Rounding, gram_of
from qcompiler.rounding.columns import hold, stepper
from qcompiler.rounding.nearest import nearest
from qcompiler.rounding.search import By, fit

LEAF = 16
"""Columns that are rounded one by one before a matrix product brings all that follow up to date."""
LEAST, MOST = 1e-4, 1e2
"""Damping that is tried after none, and the largest."""

Refit = Callable[[Tensor, int], Grid]
"""(columns of a group as all before have left them, (out, group), the first of them) → a grid."""


@dataclass(frozen=True, kw_only=True)
class Gptq(Rounding):
    """Round column by column, the following ones making up for the error."""

    name: ClassVar[str] = "gptq"
    needs: ClassVar[tuple[Need, ...]] = ("gram",)

    damping: float = 0.01
    """λ in units of the mean diagonal of H; ten times more as long as H + λ I has no factor."""
    order: bool = True
    """Columns with the largest inputs first."""
    static: bool = True
    """Scales are found before; False: of each group when its turn comes (needs order=false)."""
    search: By = "none"
    """How ranges are found, as in `search`. `mse` helps where blocks are whole rows; in groups of
    32 it lowers the layer's error, and yet a network's outputs tend to suffer."""

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise BadInput(f"gptq: damping is 0 or more, found {self.damping}")
        if self.order and not self.static:
            raise BadInput("gptq: groups out of order have scales of before; write order=false")

    def layer(self, layer: Layer) -> QTensor:
        found = definite(layer, self.damping, self.order)
        if found is None:
            return nearest(layer.weight, layer.format)
        fmt, importance = layer.format, gram_of(layer).diagonal()
        if self.static:
            grid = fit(layer.weight, fmt, self.search, importance)
            return gptq(layer.weight, found, grid)
        if fmt.scale is not None:
            raise BadInput(f"gptq: scales that are rounded themselves are found before all: {fmt}")

        def refit(columns: Tensor, first: int) -> Grid:
            return fit(columns, fmt, self.search, importance[first : first + columns.shape[1]])

        return gptq(layer.weight, found, Grid.fit(layer.weight, fmt), refit)


@dataclass(frozen=True, eq=False)
class Factor:
    """The triangle of H + λ I, its columns in order."""

    order: Tensor
    """Which column comes when, (in,)."""
    feedback: Tensor
    """K_jk / K_jj where k < j, and 0, (in, in)."""
    damping: float
    """λ in units of the mean diagonal."""

    def damped(self, gram: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """H + λ I of the H it was made of, columns in their own order."""
        damped = gram.to(dtype, copy=True)
        damped.diagonal().add_(self.damping * gram.diagonal().mean())
        return damped


def definite(layer: Layer, damping: float, order: bool = True) -> Factor | None:
    """The triangle for a layer, which is told if it took more damping, or none was enough."""
    found = factor(gram_of(layer), damping, order)
    if found is None:
        layer.notes.append("no damping makes its Gram matrix definite; rounded to nearest")
    elif found.damping != damping:
        layer.notes.append(f"its Gram matrix is singular; damping {found.damping:g}")
    return found


def factor(gram: Tensor, damping: float = 0.01, order: bool = True) -> Factor | None:
    """The triangle of the (in, in) matrix `gram`; None if no damping makes it positive definite."""
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    columns = diagonal.argsort(descending=True) if order else torch.arange(len(gram))
    back = columns.flip(0)
    while mean > 0 and damping <= MOST:
        for dtype in (gram.dtype, torch.float64):
            damped = gram.index_select(0, back).index_select(1, back).to(dtype)
            damped.diagonal().add_(damping * mean)
            upper, failed = torch.linalg.cholesky_ex(damped, upper=True)
            if not failed and bool(upper.diagonal().isfinite().all()):
                # Both axes backwards make the upper triangle of the one order that of the other.
                lower = upper.flip(0, 1).to(gram.dtype)
                lower /= lower.diagonal()[:, None].clone()
                lower.diagonal().zero_()
                return Factor(columns, lower, damping)
        damping = max(10 * damping, LEAST)
    return None


def gptq(weight: Tensor, found: Factor, grid: Grid, refit: Refit | None = None) -> QTensor:
    """`weight` (out, in) rounded on `grid`; with `refit`, on what that finds for each group of it.

    Computes in the type of `weight`.
    """
    work = _Work(weight, found, grid, refit)
    work.solve(0, weight.shape[1])
    return hold(_beside(work.grids), work.codes)


class _Work:
    """A matrix on its way, transposed."""

    def __init__(self, weight: Tensor, found: Factor, grid: Grid, refit: Refit | None) -> None:
        self.rest = weight.t().contiguous()[found.order]
        """w_j of columns to come, e_j of those that are done."""
        self.target = self.rest.clone()
        self.codes = torch.empty_like(self.rest)
        self.feedback = found.feedback.to(weight.dtype)
        self.columns = found.order.tolist()
        self.refit = refit
        self.grids = [] if refit else [grid]
        self.step = stepper(grid, tuple(weight.shape), weight.dtype)
        wide = grid.format.blocks(tuple(weight.shape))[1]
        self.group = weight.shape[1] if wide == -1 else wide

    def solve(self, low: int, high: int) -> None:
        """Round columns `low` to `high`, whose targets have heard of all columns before `low`."""
        if self.refit and low % self.group == 0 and high == self._end(low):
            self._enter(low, self.refit(self._now(low, high), low))
        if high - low <= LEAF and (self.refit is None or high <= self._end(low)):
            return self._leaf(low, high)
        unit = self.group if self.refit and high > self._end(low) else 1
        middle = low + -(-(high - low) // (2 * unit)) * unit
        self.solve(low, middle)
        error, share = self.rest[low:middle], self.feedback[middle:high, low:middle]
        self.target[middle:high].addmm_(share, error)
        self.solve(middle, high)

    def _leaf(self, low: int, high: int) -> None:
        targets, rests = self.target[low:high].unbind(0), self.rest[low:high].unbind(0)
        # What is still to come counts as nothing, which costs less than leaving it out.
        errors, share = self.rest[low:high].t(), self.feedback[low:high, low:high].unbind(0)
        for i, column in enumerate(self.columns[low:high]):
            targets[i].addmv_(errors, share[i])
            self.step(column, targets[i], rests[i], self.codes[column])

    def _end(self, low: int) -> int:
        return min((low // self.group + 1) * self.group, len(self.columns))

    def _now(self, low: int, high: int) -> Tensor:
        """What columns `low` to `high` would best be if they were not rounded, (out, columns).

        All the terms of the loss are then 0: (I + K_jk / K_jj) (w - w_now) = w - target.
        """
        rest = self.rest[low:high]
        moved: Tensor = torch.linalg.solve_triangular(
            self.feedback[low:high, low:high],
            self.target[low:high] - rest,
            upper=False,
            unitriangular=True,
        )
        return (rest + moved).t()

    def _enter(self, low: int, grid: Grid) -> None:
        width = self._end(low) - low
        step = stepper(grid, (self.rest.shape[1], width), self.rest.dtype)
        self.grids.append(grid)
        self.step = lambda column, target, rest, codes: step(column - low, target, rest, codes)


def _beside(grids: list[Grid]) -> Grid:
    """The grid of groups that lie side by side."""
    first = grids[0]
    if len(grids) == 1:
        return first
    zeros = [g.zero for g in grids if g.zero is not None]
    return Grid(
        first.format, torch.cat([g.scale for g in grids], 1), torch.cat(zeros, 1) if zeros else None
    )
