"""HQQ: zero points for which few weights are far off, without any data.

    min over z, E of  ‖E‖_p^p + β/2 ‖ E - (W - W') ‖²,    W' = s (q - z),  q = Q(W / s + z)
    E ← sign(D) max(|D| - |D|^(p-1) / β, 0),  D = W - W'          z ← mean( q - (W - E) / s )

(Badri and Shaji 2023, half-quadratic quantization; p = 0.7, β growing by 1 %.) Errors are taken in
units of the scale, so that the result scales with the weights. Zero points are floating point
numbers of 16 bits. Formats without any get scales by the same steps:

    s ← Σ q' (W - E) / Σ q'²,        q' what the codes stand for

A block keeps what had the smallest Σ |D|^p on the way. Codebooks have neither, see `kmeans`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.errors import BadInput
from qcompiler.formats import Grid, QFormat, QTensor
from qcompiler.rounding.base import Layer, Rounding
from qcompiler.rounding.folded import best_of, fold, round_folded, sides, with_scales

POWER = 0.7
PENALTY, GROWTH = 10.0, 1.01


@dataclass(frozen=True, kw_only=True)
class Hqq(Rounding):
    """Half-quadratic zero points, or scales; needs no data."""

    name: ClassVar[str] = "hqq"

    steps: int = 20
    """Iterations, at most."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise BadInput(f"hqq: steps is 1 or more, found {self.steps}")

    def layer(self, layer: Layer) -> QTensor:
        if layer.format.is_codebook:
            raise BadInput(
                f"hqq finds zero points and scales, and {layer.format} of {layer.id} has neither; "
                f"use kmeans"
            )
        return hqq(layer.weight, layer.format, self.steps).quantize(layer.weight.float())


def hqq(weight: Tensor, fmt: QFormat, steps: int = 20) -> Grid:
    """The grid for a matrix (out, in)."""
    weight = weight.float()
    grid = Grid.fit(weight, fmt)
    if fmt.unscaled:
        return grid
    if grid.zero is not None:
        grid = replace(grid, zero=grid.zero.float())
    x, inside = fold(weight, fmt), fold(torch.ones_like(weight), fmt)

    def loss(trial: Grid) -> Tensor:
        error = (x - round_folded(x, *sides(trial), fmt)).abs() * inside
        return error.pow(POWER).sum(-1)

    best = best_of(grid, _steps(grid, x, inside, steps), loss)
    return best if best.zero is None else replace(best, zero=best.zero.half().float())


def _steps(grid: Grid, x: Tensor, inside: Tensor, steps: int) -> Iterator[Grid]:
    """What the iterations come to, one after the other, until nothing moves any more."""
    fmt, raw, penalty = grid.format, grid.scale, PENALTY
    for _ in range(steps):
        scale, zero = sides(replace(grid, scale=raw))
        u, value = x / scale, round_folded(x, scale, zero, fmt) / scale
        far = u - value
        error = far.sign() * (far.abs() - far.abs().pow(POWER - 1) / penalty).clamp_min(0)
        if grid.zero is not None:
            # mean( q - (u - E) ) with q = u - D + z
            moved = ((error - far) * inside).sum(-1) / inside.sum(-1)
            grid = replace(grid, zero=grid.zero + moved.reshape(grid.zero.shape))
        else:
            square = (value * value * inside).sum(-1)
            ratio = (value * (u - error) * inside).sum(-1) / square
            ratio = torch.where((square > 0) & (ratio > 0), ratio, 1.0)
            raw, moved = raw * ratio.reshape(raw.shape), ratio - 1
            grid = with_scales(grid, raw)
        if not bool(moved.any()):
            return
        penalty *= GROWTH
        yield grid
