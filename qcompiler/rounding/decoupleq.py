"""decoupleQ: integers and scales in turns, each the best for the other.

    min over q, s, t of  tr(E H Eᵀ),   W' = s q + t,   E = W - W'        t = -s z, block by block
    (i)   q by GPTQ and coordinate descent, s and t as they are
    (ii)  [s t] by least squares, q as it is: a block's normal equations are
          [ vᵀHv  vᵀH1 ] [Δs]   [ vᵀ H e ]
          [ vᵀH1  1ᵀH1 ] [Δt] = [ 1ᵀ H e ]        v the block's q, e its row of E

(Guo et al. 2024, decoupleQ.) Made for 2 bits, where rounding for a given scale wastes most. Each
step lowers the loss or is not taken. Zero points are floating point numbers of 16 bits; formats
without any have t = 0, and elements that are no integers have their numbers for q. Codebooks have
no scales (see `kmeans`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.formats import Grid, QFormat, QTensor
from qcompiler.rounding.descent import descend
from qcompiler.rounding.gptq import Factor, gptq
from qcompiler.rounding.scaled import Scaled
from qcompiler.rounding.search import By, fit

PASSES = 4
"""Rounds of coordinate descent in each turn."""
ENOUGH = 1e-3
"""It ends when the loss falls by less than this share."""


@dataclass(frozen=True, kw_only=True)
class DecoupleQ(Scaled):
    """Integers and scales in turns, for the output's error."""

    name: ClassVar[str] = "decoupleq"
    instead: ClassVar[str] = "quantease"

    turns: int = 10
    """Turns, at most."""
    search: By = "output"
    """How the first ranges are found, as in `search`."""

    def solve(self, weight: Tensor, fmt: QFormat, gram: Tensor, found: Factor) -> QTensor:
        grid = fit(weight, fmt, self.search, gram.diagonal())
        return decouple(weight, found.damped(gram), found, grid, self.turns)


def decouple(weight: Tensor, gram: Tensor, found: Factor, grid: Grid, turns: int) -> QTensor:
    """A matrix (out, in) on a grid that starts as `grid`; `found` is the triangle of `gram`."""
    best = descend(weight, gram, gptq(weight, found, grid), PASSES)
    loss = _loss(weight, gram, best)
    for _ in range(turns):
        refitted = refit(weight, gram, best)
        # The descent starts once from where it is, and once from what the new grid gives afresh.
        starts = [refitted, gptq(weight, found, refitted.grid)]
        tried = [best, refitted, *(descend(weight, gram, q, PASSES) for q in starts)]
        before, (loss, best) = loss, min(((_loss(weight, gram, q), q) for q in tried), key=_first)
        if loss >= before * (1 - ENOUGH):
            break
    return best


def refit(weight: Tensor, gram: Tensor, q: QTensor) -> QTensor:
    """The same codes with scales (and zero points) by least squares, one block after the other."""
    fmt, shape = q.format, tuple(weight.shape)
    wide = _Sides(q)
    error = weight - q.dequantize()
    pull = error @ gram
    step = fmt.blocks(shape)[1]
    step = shape[1] if step == -1 else step
    for number, low in enumerate(range(0, shape[1], step)):
        here = slice(low, low + step)
        change = wide.improve(number, here, gram[here, here], pull[:, here])
        pull -= change @ gram[here]
    return QTensor(q.data, wide.grid())


class _Sides:
    """Scales and offsets on their way."""

    def __init__(self, q: QTensor) -> None:
        self._grid, fmt, shape = q.grid, q.format, tuple(q.data.shape)
        self._numbers = q.data.float() if fmt.is_integer else fmt.kind.decode(q.data.int()).float()
        self._scale = q.scale.expand(fmt.scale_shape(shape)).clone()
        self._offset = None if q.zero is None else -self._scale * q.zero
        rows = fmt.blocks(shape)[0]
        self._owner = torch.arange(shape[0]) // (shape[0] if rows == -1 else rows)
        """Which row of scales a row of numbers belongs to."""

    def improve(self, number: int, here: slice, gram: Tensor, pull: Tensor) -> Tensor:
        """Solve the blocks of columns `here`; by how much that changes them."""
        v = self._numbers[:, here]
        hv = v @ gram
        vv, pv = self._pooled((hv * v).sum(1)), self._pooled((pull * v).sum(1))
        scale = self._scale[:, number]
        if self._offset is None:
            step = torch.where(vv > 0, pv / vv, 0)
            shift = torch.zeros_like(step)
        else:
            v1, p1 = self._pooled(hv.sum(1)), self._pooled(pull.sum(1))
            n1 = self._pooled(gram.sum().expand(len(v)))
            free = vv * n1 - v1 * v1
            # All codes of a block alike leave one unknown: its scale stays.
            whole = free > 1e-6 * vv * n1
            step = torch.where(whole, (n1 * pv - v1 * p1) / free, 0)
            shift = torch.where(n1 > 0, (p1 - v1 * step) / n1, 0)
        good = scale + step > 0
        step, shift = torch.where(good, step, 0), torch.where(good, shift, 0)
        scale += step
        if self._offset is not None:
            self._offset[:, number] += shift
        return step[self._owner, None] * v + shift[self._owner, None]

    def grid(self) -> Grid:
        grid = Grid.of(self._grid.format, self._scale)
        if self._offset is None:
            return grid
        return replace(grid, zero=(-self._offset / grid.scale).half().float())

    def _pooled(self, rows: Tensor) -> Tensor:
        """Sums over the rows that share scales."""
        found = torch.zeros(len(self._scale), dtype=rows.dtype)
        return found.index_add_(0, self._owner, rows)


def _loss(weight: Tensor, gram: Tensor, q: QTensor) -> float:
    error = weight - q.dequantize()
    return float((error @ gram * error).sum(dtype=torch.float64))


def _first(pair: tuple[float, QTensor]) -> float:
    return pair[0]
