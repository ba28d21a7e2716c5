"""Clipping search: cut a group's range off where its share of the output suffers least.

    min over c in {1, 0.95, …, 0.55} of  ‖ (w_g - Q(w_g; c · range)) X_gᵀ ‖²

(AWQ, Lin et al. 2024, appendix and code.) X_g are sampled vectors' elements of the group's columns;
the norm is taken by their Gram matrix X_gᵀ X_g, so that no product with every vector is made. With
a zero point each end is cut for itself, too. Codebooks have no range to cut, see `kmeans`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.errors import BadInput
from qcompiler.formats import Grid, QFormat, QTensor
from qcompiler.formats.grid import block_range
from qcompiler.rounding.base import Layer, Need, Rounding
from qcompiler.rounding.folded import best_range

SHARES = tuple(1 - i / 20 for i in range(1, 10))
"""Shares of the range that are tried after the whole."""


@dataclass(frozen=True, kw_only=True)
class Clip(Rounding):
    """Round to nearest with ranges that are cut off for the output's sake."""

    name: ClassVar[str] = "clip"
    needs: ClassVar[tuple[Need, ...]] = ("sample",)

    def layer(self, layer: Layer) -> QTensor:
        if layer.format.is_codebook:
            raise BadInput(
                f"clip cuts ranges off, and {layer.format} of {layer.id} has none; use kmeans"
            )
        if layer.inputs.sample is None:
            raise BadInput(f"no calibration data reached {layer.id}; is it computed at all?")
        return clip(layer.weight, layer.format, layer.inputs.sample).quantize(layer.weight.float())


def clip(weight: Tensor, fmt: QFormat, sample: Tensor) -> Grid:
    """The grid for a matrix (out, in) whose inputs are like `sample` (vectors, in)."""
    weight = weight.float()
    grid = Grid.fit(weight, fmt)
    if fmt.unscaled:
        return grid
    low, high = block_range(weight, fmt)
    tall, wide = fmt.blocks(tuple(weight.shape))
    wide = weight.shape[1] if wide == -1 else wide
    inputs = _groups(sample.float(), wide)
    grams = inputs.mT @ inputs

    def loss(trial: Grid) -> Tensor:
        error = _groups(trial.round(weight) - weight, wide)
        rows = ((error @ grams) * error).sum(-1).t()
        if tall == 1:
            return rows.flatten()
        high = len(weight) if tall == -1 else tall
        padded = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % high))
        return padded.reshape(-1, high, rows.shape[1]).sum(1).flatten()

    return best_range(grid, low, high, SHARES, loss)


def _groups(x: Tensor, wide: int) -> Tensor:
    """Columns (…, in) by groups, (groups, …, wide); a short one is filled up with zeros."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % wide))
    return x.reshape(len(x), -1, wide).transpose(0, 1)
