"""Rounding a matrix column by column on a fixed grid: the inner step of GPTQ and QuantEase.

The matrix is held transposed, so that a column is a contiguous row, and everything is written in
place: a column costs as many operator calls as the equation has signs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcompiler.formats import Grid, QTensor
from qcompiler.formats.grid import encode

Step = Callable[[int, Tensor, Tensor, Tensor], None]
"""(column, target, rest, codes): put the codes of `target` into `codes`, and take what they stand
for off `rest`. Codes of affine integers are q - z here."""


def stepper(grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> Step:
    """What rounds columns of a matrix (out, in) of this `shape`."""
    if grid.table is not None:
        return _by_table(grid)
    scale, block = _by_column(grid.scale, grid, shape, dtype)
    zero = None if grid.zero is None else _by_column(grid.zero, grid, shape, dtype)[0]
    if grid.format.is_integer and (grid.zero is None or not grid.zero.is_floating_point()):
        return _integers(grid, scale, zero, block)
    return _elements(grid, scale, zero, block)


def hold(grid: Grid, codes: Tensor) -> QTensor:
    """The rounded matrix, from the `codes` (in, out) that steps have written."""
    q = codes.t()
    if grid.format.is_integer and grid.zero is not None and not grid.zero.is_floating_point():
        zero = grid.columns(tuple(q.shape))[1]
        assert zero is not None
        q = q + zero
    return grid.hold(q.contiguous())


def unhold(q: QTensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `hold`."""
    codes, zero = q.data, q.zero
    if q.format.is_integer and zero is not None and not zero.is_floating_point():
        spread = q.grid.columns(tuple(codes.shape))[1]
        assert spread is not None
        codes = codes - spread
    return codes.t().to(dtype).contiguous()


def _by_column(
    side: Tensor, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], int]:
    """Scales or zero points (out or 1,) of each block of columns, and the columns of a block."""
    high, wide = grid.format.blocks(shape)
    if side.shape[0] not in (1, shape[0]):
        side = side.repeat_interleave(high, 0)[: shape[0]]
    return side.to(dtype).t().contiguous().unbind(0), shape[1] if wide == -1 else wide


def _integers(
    grid: Grid, scale: tuple[Tensor, ...], zero: tuple[Tensor, ...] | None, block: int
) -> Step:
    fmt = grid.format
    # Bounds move by the zero point instead of the numbers: one operation less for each column.
    zero = zero or (torch.zeros_like(scale[0]),) * len(scale)
    low, high = [fmt.qmin - z for z in zero], [fmt.qmax - z for z in zero]

    def step(column: int, target: Tensor, rest: Tensor, codes: Tensor) -> None:
        at = column // block
        torch.div(target, scale[at], out=codes)
        codes.round_().clamp_(low[at], high[at])
        rest.addcmul_(codes, scale[at], value=-1)

    return step


def _elements(
    grid: Grid, scale: tuple[Tensor, ...], zero: tuple[Tensor, ...] | None, block: int
) -> Step:
    fmt = grid.format

    def step(column: int, target: Tensor, rest: Tensor, codes: Tensor) -> None:
        at = column // block
        found = encode(target / scale[at], None if zero is None else zero[at], fmt)
        codes.copy_(found)
        value = codes if fmt.is_integer else fmt.kind.decode(found).to(codes.dtype)
        if zero is not None:
            value = value - zero[at]
        rest.addcmul_(value, scale[at], value=-1)

    return step


def _by_table(grid: Grid) -> Step:
    def step(column: int, target: Tensor, rest: Tensor, codes: Tensor) -> None:
        found = grid.codes(target.unsqueeze(1))
        codes.copy_(found.squeeze(1))
        rest -= grid.decode(found, rest.dtype).squeeze(1)

    return step
