"""The numbers of a codebook by weighted k-means in one dimension, row by row.

    min over tables C_r of  Σ_j F_rj (w_rj - c)²,   c the nearest number of C_r

(SqueezeLLM, Kim et al. 2024, eq. 4.) F is the Fisher information of the weights where it was
asked for, else the mean square of the inputs, else 1. A row is sorted once; sums of a cluster are
then differences of running sums, and an iteration of Lloyd costs a search of the middles. The best
of two starts is kept: evenly spaced, which is what rounding to nearest has, and the optimum among
clusters that end at some `CUTS` places (Bellman 1973), which is exact for that many different
numbers. Above 5 bits, in its place, by the density to the power of ⅓ (Panter and Dite 1951).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.errors import BadInput
from qcompiler.formats import Grid, QFormat, QTensor
from qcompiler.rounding.base import Layer, Need, Rounding

CHUNK = 2**20
"""Elements that are sorted, and costs that are compared, at a time."""
CUTS = 128
"""Half by density, half at the widest gaps."""
EXACT = 32
"""Numbers of a table that are found so, at most."""
PASSES = 100
"""Iterations of Lloyd, at most; it ends when no number moves any more."""


@dataclass(frozen=True, kw_only=True)
class KMeans(Rounding):
    """Learn the table of a codebook."""

    name: ClassVar[str] = "kmeans"
    needs: ClassVar[tuple[Need, ...]] = ("range", "fisher")

    def layer(self, layer: Layer) -> QTensor:
        fmt = layer.format
        if not fmt.is_codebook:
            raise BadInput(
                f"kmeans learns the numbers of a codebook, and {fmt} of {layer.id} has its own; "
                f"write codebook{min(fmt.bits, 8)}:channel"
            )
        seen, importance = layer.inputs, layer.inputs.fisher
        if importance is None and seen.range is not None:
            importance = seen.range.square
        return codebook(layer.weight, fmt, importance).quantize(layer.weight.float())


def codebook(weight: Tensor, fmt: QFormat, importance: Tensor | None = None) -> Grid:
    """The grid with a table for each row of `weight` (out, in), or one for all of it.

    `importance` broadcasts against `weight`; rows without any count evenly.
    """
    counts = torch.ones(1) if importance is None else importance
    counts = counts.expand(weight.shape)
    if fmt.block is None:
        weight, counts = weight.reshape(1, -1), counts.reshape(1, -1)
    step = max(CHUNK // max(weight.shape[1], CUTS**2), 1)
    parts = zip(weight.split(step), counts.split(step), strict=True)
    table = torch.cat([_tables(w.double(), c.double(), int(2**fmt.bits)) for w, c in parts])
    return Grid(fmt, torch.ones(1), None, table.float())


def _tables(weight: Tensor, counts: Tensor, numbers: int) -> Tensor:
    x, order = weight.sort(-1)
    share = counts.gather(1, order)
    share = torch.where(share.sum(-1, keepdim=True) > 0, share, torch.ones_like(share))
    sums = [_running(share * x**i) for i in range(3)]
    even = torch.lerp(x[:, :1], x[:, -1:], torch.linspace(0, 1, numbers, dtype=x.dtype))
    places = _by_density(x, share, CUTS // 2 if numbers <= EXACT else numbers)
    if numbers <= EXACT:
        gaps = x.diff(dim=-1)
        places = torch.cat([places, gaps.topk(min(CUTS // 2, gaps.shape[1])).indices + 1], 1)
        other = _optimal(x, sums, places.sort(-1).values, numbers)
    else:
        other = x.gather(1, places)
    tables = torch.stack([_lloyd(x, sums, start) for start in (even, other)])
    best = torch.stack([_loss(x, sums, table) for table in tables]).argmin(0)
    return tables[best, torch.arange(len(x))]


def _optimal(x: Tensor, sums: list[Tensor], places: Tensor, numbers: int) -> Tensor:
    """The means of the best `numbers` clusters that end at some of the `places`."""
    first = torch.zeros_like(places[:, :1])
    places = torch.cat([first, places, torch.full_like(first, x.shape[1])], 1)
    mass, moment, square = (s.gather(1, places) for s in sums)
    mass, moment, square = (s[:, None] - s[:, :, None] for s in (mass, moment, square))
    cost = square - torch.where(mass > 0, moment**2 / mass, 0.0)
    cost = cost.masked_fill(torch.ones(cost.shape[1:]).tril(-1).bool(), torch.inf)
    best, came = cost[:, 0], []
    for _ in range(numbers - 1):
        best, start = (best[:, :, None] + cost).min(1)
        came.append(start)
    ends = [torch.full_like(first, places.shape[1] - 1)]
    for start in reversed(came):
        ends.append(start.gather(1, ends[-1]))
    at = places.gather(1, torch.cat([first, *reversed(ends)], 1))
    mass, moment = (s.gather(1, at).diff(dim=1) for s in sums[:2])
    empty = x.gather(1, at[:, :-1].clamp(max=x.shape[1] - 1))
    return torch.where(mass > 0, moment / mass, empty)


def _lloyd(x: Tensor, sums: list[Tensor], table: Tensor) -> Tensor:
    """Move each number of the `table` to the mean of what it is nearest to, until none moves."""
    for _ in range(PASSES):
        mass, moment = _clusters(x, sums, table)
        moved = torch.where(mass > 0, moment / mass, table).sort(-1).values
        if torch.equal(moved, table):
            break
        table = moved
    return table


def _loss(x: Tensor, sums: list[Tensor], table: Tensor) -> Tensor:
    """Σ F (x - c)² but for Σ F x², which no table changes."""
    mass, moment = _clusters(x, sums, table)
    return (mass * table**2 - 2 * moment * table).sum(-1)


def _clusters(x: Tensor, sums: list[Tensor], table: Tensor) -> list[Tensor]:
    """Σ F and Σ F x of what is nearest to each number, (rows, numbers)."""
    ends = torch.searchsorted(x, (table[:, 1:] + table[:, :-1]) / 2)
    first, last = torch.zeros_like(ends[:, :1]), torch.full_like(ends[:, :1], x.shape[1])
    ends = torch.cat([first, ends, last], 1)
    return [s.gather(1, ends).diff(dim=1) for s in sums[:2]]


def _by_density(x: Tensor, share: Tensor, count: int) -> Tensor:
    """`count` places in rows of `x` by the density of `share` to the power of ⅓."""
    mass = (share[:, 1:] + share[:, :-1]) / 2
    # A gap g with mass m has density m/g, and (m/g)^⅓ g of the places.
    part = _running(mass.pow(1 / 3) * x.diff(dim=-1).pow(2 / 3))
    wanted = (torch.arange(count, dtype=x.dtype) + 0.5) / count * part[:, -1:]
    return torch.searchsorted(part, wanted).clamp(max=x.shape[1] - 1)


def _running(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))
