"""Dense and sparse: the few weights that rounding would hurt most stay as they are.

    W = D + S,   y = x Dᵀ + b + x Sᵀ        S: largest |w|, or largest w² E[x_j²], in CSR

SqueezeLLM (Kim et al. 2023) and SpQR (Dettmers et al. 2023). Without its outliers D has a smaller
range, so that all other weights of a row round on a finer grid. Each layer takes the better choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.split import (
    INDEX_BYTES,
    Layer,
    Split,
    accept,
    computed,
    join,
    layers,
    main,
    require,
)

aten = torch.ops.aten
qc = torch.ops.qc


@dataclass(frozen=True, kw_only=True)
class SplitSparse(Pass):
    """Keep a small share of the weights unrounded, in a sparse matrix (SqueezeLLM, SpQR)."""

    name: ClassVar[str] = "split_sparse"
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[tuple[str, ...]] = ("samples",)
    makes: ClassVar[tuple[str, ...]] = ("splits",)
    reads: ClassVar[tuple[str, ...]] = ("weights", "plan")

    ratio: float = 0.005
    """Share of a layer's weights that stay, rounded up."""
    by: Literal["magnitude", "sensitivity", "best"] = "best"
    """Which ones: largest |w|, largest w² E[x²], or what lowers a layer's error more."""
    gain: float = 0.1
    """Share by which a layer's error must fall; a negative one lets it rise."""

    def run(self, edit: Edit, facts: Facts) -> None:
        require(self.name, "ratio", self.ratio, 0 < self.ratio < 1, "between 0 and 1")
        require(self.name, "gain", self.gain, self.gain < 1, "below 1")
        for layer in layers(edit, facts, self.name):
            rows, width = layer.weight.shape
            tried = [(_error(layer, places), places) for places in self._choices(layer)]
            error, places = min(tried, key=lambda t: t[0])
            entries = len(places) * (layer.dtype.itemsize + INDEX_BYTES)
            split = Split(
                f"sparse part of {len(places):,} weights",
                error,
                layer.bytes + entries + (rows + 1) * INDEX_BYTES,
                len(places) / (rows * width),
            )
            if accept(edit, layer, split, self.gain):
                _apply(edit, layer, places)

    def _choices(self, layer: Layer) -> list[Tensor]:
        """Numbers of weights in the flat matrix, in order, for each way to choose."""
        size = layer.weight.abs()
        scores = {"magnitude": size, "sensitivity": size * layer.x.pow(2).mean(0).sqrt()}
        count = math.ceil(self.ratio * size.numel())
        return [
            score.flatten().topk(count).indices.sort().values
            for name, score in scores.items()
            if self.by in (name, "best")
        ]


def _error(layer: Layer, places: Tensor) -> float:
    """Error with the weights at `places` left unrounded."""
    dense = layer.weight.flatten().index_fill(0, places, 0).view_as(layer.weight)
    sparse = layer.x @ (layer.weight - dense).t()
    return layer.error(computed(layer.x, dense, layer.scheme), sparse)


def _apply(edit: Edit, layer: Layer, places: Tensor) -> None:
    """Both parts read the weight's edge at the same places, so that they sum to it exactly."""
    node, stem = layer.site.node, f"{layer.stem}.sparse"
    rows, width = layer.weight.shape
    starts = torch.zeros(rows + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(places // width, minlength=rows).cumsum(0)
    at = edit.new_param(f"{stem}.places", places, like=node)
    columns = edit.new_param(f"{stem}.columns", (places % width).to(torch.int32), like=node)
    starts_node = edit.new_param(f"{stem}.rows", starts, like=node)
    flat = edit.call(aten.reshape.default, layer.site.weight, [-1], like=node)
    values = edit.call(aten.index_select.default, flat, 0, at, like=node)
    dense = edit.call(aten.index_fill.int_Scalar, flat, 0, at, 0, like=node)
    dense = edit.call(aten.reshape.default, dense, [rows, width], like=node)
    x = layer.site.x
    assert x is not None
    first = main(edit, layer, x, dense)
    sparse = edit.call(qc.sparse_linear.default, x, values, columns, starts_node, like=node)
    join(edit, layer, first, sparse)
