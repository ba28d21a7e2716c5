"""A matrix by the blocks that share a scale, and grids that differ in their scales alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qcompiler.formats import Grid, QFormat
from qcompiler.formats.grid import encode


def fold(x: Tensor, fmt: QFormat) -> Tensor:
    """Elements (blocks, size) of a matrix, blocks in the order of `scale.flatten()`.

    Short blocks at the ends are filled up with zeros.
    """
    (rows, columns), (high, wide) = x.shape, fmt.blocks(tuple(x.shape))
    high, wide = rows if high == -1 else high, columns if wide == -1 else wide
    x = torch.nn.functional.pad(x, (0, -columns % wide, 0, -rows % high))
    down, across = x.shape[0] // high, x.shape[1] // wide
    return x.reshape(down, high, across, wide).transpose(1, 2).reshape(down * across, high * wide)


def sides(grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points as they broadcast against what `fold` gives."""
    return grid.scale.reshape(-1, 1), None if grid.zero is None else grid.zero.reshape(-1, 1)


def round_folded(x: Tensor, scale: Tensor, zero: Tensor | None, fmt: QFormat) -> Tensor:
    """The nearest numbers of the grid for folded `x`, `scale` and `zero`."""
    codes = encode(x / scale, zero, fmt)
    value = codes if fmt.is_integer else fmt.kind.decode(codes).to(x.dtype)
    return (value if zero is None else value - zero) * scale


def with_scales(grid: Grid, scale: Tensor) -> Grid:
    """`grid` with other scales, as far as its format can store them.

    Scales of scales stay as they are, so that each block's choice is its own.
    """
    if grid.stored is None:
        return replace(grid, scale=scale)
    inner = grid.stored.grid
    value = inner.round(scale)
    kept = inner.quantize(torch.where(value == 0, inner.least(scale), value))
    return replace(grid, scale=kept.dequantize(), stored=kept)


def with_range(grid: Grid, low: Tensor, high: Tensor) -> Grid:
    """`grid` with scales and zero points for the ranges [low, high] of its blocks."""
    fmt = grid.format
    plain = Grid.cover(low, high, replace(fmt, scale=None))
    moved = with_scales(grid, plain.scale)
    if plain.zero is None or grid.stored is None:
        return replace(moved, zero=plain.zero)
    zero = torch.round(fmt.qmin - low.clamp(max=0) / moved.scale).clamp(fmt.qmin, fmt.qmax)
    return replace(moved, zero=zero.to(torch.int16))


Loss = Callable[[Grid], Tensor]
"""What a grid costs each block, in the order of the scales."""


def best_of(grid: Grid, trials: Iterable[Grid], loss: Loss) -> Grid:
    """For each block, the scale and zero point of `grid` or of that one of `trials` which costs it
    least, the first of equals."""
    best = _Best(grid, loss)
    for trial in trials:
        best.look(trial)
    return best.grid()


def best_range(grid: Grid, low: Tensor, high: Tensor, shares: Sequence[float], loss: Loss) -> Grid:
    """The best of grids for `shares` of each block's range [low, high], and of `grid` itself.

    Both ends are drawn in together; with a zero point, then one after the other.
    """
    best = _Best(grid, loss, low, high)

    def look(low: Tensor, high: Tensor) -> None:
        best.look(with_range(grid, low, high), low, high)

    for share in shares:
        look(low * share, high * share)
    if grid.zero is not None:
        first = best.ends[0]
        for share in (1.0, *shares):
            look(first, high * share)
        last = best.ends[1]
        for share in (1.0, *shares):
            look(low * share, last)
    return best.grid()


class _Best:
    """What costs each block least, of all that was looked at."""

    def __init__(self, grid: Grid, loss: Loss, *ends: Tensor) -> None:
        self._grid, self._loss, self._least = grid, loss, loss(grid)
        self._scale, self._zero, self.ends = grid.scale, grid.zero, ends

    def look(self, trial: Grid, *ends: Tensor) -> None:
        """Take what is better of `trial`, and the `ends` of its ranges with it."""
        found = self._loss(trial)
        better = (found < self._least).reshape(self._scale.shape)
        self._least = torch.minimum(found, self._least)
        self._scale = torch.where(better, trial.scale, self._scale)
        if self._zero is not None and trial.zero is not None:
            self._zero = torch.where(better, trial.zero, self._zero)
        pairs = zip(ends, self.ends, strict=True)
        self.ends = tuple(torch.where(better, new, old) for new, old in pairs)

    def grid(self) -> Grid:
        return replace(with_scales(self._grid, self._scale), zero=self._zero)
