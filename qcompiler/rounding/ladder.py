"""`Ladder`: the numbers of a grid in rising order, and where a weight stands among them.

    p(w) = k + (w - v_k) / (v_k+1 - v_k)        v_k ≤ w < v_k+1

Rounding p rounds w to nearest, and adding to p moves a weight towards its neighbour, whatever the
format: for integers p = w/s + z - qmin, for all others the numbers are looked up.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from qcompiler.formats import Grid, QFormat, QTensor, spread


class Ladder:
    """The numbers that each element of a matrix of this `shape` may take."""

    def __init__(self, grid: Grid, shape: tuple[int, ...]) -> None:
        self.grid = grid
        fmt = grid.format
        self._scale = spread(grid.scale, shape, fmt)
        self._zero = None if grid.zero is None else spread(grid.zero, shape, fmt)
        if fmt.is_integer:
            self.last = fmt.qmax - fmt.qmin
            return
        if grid.table is not None:
            self._numbers = grid.table.expand(shape[0], -1).contiguous()
            self._codes = torch.arange(grid.table.shape[-1])
        else:
            self._numbers, self._codes = numbers(fmt)
        self.last = self._numbers.shape[-1] - 1

    def position(self, w: Tensor) -> Tensor:
        """p(w), which goes on in the same steps beyond both ends."""
        fmt, u = self.grid.format, w / self._scale
        if fmt.is_integer:
            zero = 0 if self._zero is None else self._zero
            return u + (zero - fmt.qmin)
        below = torch.searchsorted(self._numbers, u.contiguous(), right=True)
        below = (below - 1).clamp(0, self.last - 1)
        start, end = self._at(below), self._at(below + 1)
        # Numbers of a table may coincide: what lies there stands on the first of them.
        step = torch.where(end > start, end - start, torch.inf)
        return below + (u - start) / step

    def number(self, index: Tensor) -> Tensor:
        """The number at each `index` (whole, 0 … last), float32: what its code decodes to."""
        return self.unit(index) * self._scale

    def unit(self, index: Tensor) -> Tensor:
        """`number` in units of the scale."""
        if not self.grid.format.is_integer:
            return self._at(index.long())
        value = index + self.grid.format.qmin
        return value if self._zero is None else value - self._zero

    def hold(self, index: Tensor) -> QTensor:
        """The tensor of the numbers at each `index`."""
        if self.grid.format.is_integer:
            return self.grid.hold(index + self.grid.format.qmin)
        return self.grid.hold(self._codes[index.long()])

    def through(
        self, w: Tensor, offset: Tensor | None, scale: Tensor, zero: Tensor | None = None
    ) -> Tensor:
        """round(p(w) + offset) as a number that can be differentiated.

        Its value is the grid's. Rounding counts as the identity (the straight-through estimator,
        Bengio et al. 2013), so that gradients reach w and the offset inside the range, and `scale`
        and `zero` (which have the grid's values, spread to w) everywhere.
        """
        with torch.no_grad():
            place = self.position(w) if offset is None else self.position(w) + offset
            index = place.round().clamp(0, self.last)
            inside = (place - index).abs() <= 0.5
            value = self.unit(index)
        u = w / scale
        if offset is not None:
            u = u + self._step(place) * offset
        outside = torch.zeros_like(u) if zero is None else -zero.expand_as(u)
        u = torch.where(inside, u, outside)
        return scale * (value + (u - u.detach()))

    def _step(self, place: Tensor) -> Tensor | float:
        """How far the number above is from the one below, in units of the scale."""
        if self.grid.format.is_integer:
            return 1.0
        below = place.detach().floor().clamp(0, self.last - 1).long()
        return self._at(below + 1) - self._at(below)

    def _at(self, index: Tensor) -> Tensor:
        if self._numbers.ndim == 1:
            return self._numbers[index]
        return self._numbers.gather(1, index)


@lru_cache(maxsize=64)
def numbers(fmt: QFormat) -> tuple[Tensor, Tensor]:
    """The numbers of a format's element in rising order, each once, and their codes."""
    values = fmt.kind.values()
    codes = torch.arange(len(values))
    real = values.isfinite()
    values, order = values[real].sort(stable=True)
    first = torch.ones_like(values, dtype=torch.bool)
    first[1:] = values[1:] > values[:-1]  # zero has two codes, of which +0 comes first
    return values[first], codes[real][order][first]
