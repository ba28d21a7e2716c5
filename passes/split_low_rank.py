"""A low-rank part beside the rounded weight takes what rounding cannot.

    W = (W - A B) + A B,   y = x (W - A B)ᵀ + b + (x Bᵀ) Aᵀ        A (out, r), B (r, in)

With `method=svd` A B are the largest singular values of W, which then has a smaller range
(SVDQuant, Li et al. 2024); with `residual` those of the rounding error W - Q(W - A B), in turns
(LoRC, Yao et al. 2023; LoftQ, Li et al. 2023). Each layer takes what is better for it. Weighted,
it is W diag(d) that is decomposed, d_j² = E[x_j²].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.split import Layer, Split, accept, computed, join, layers, main, require
from qcompiler.trial import rounded

aten = torch.ops.aten

TURNS = 5
"""Turns of the residual method; its error falls no further after a few."""


@dataclass(frozen=True, kw_only=True)
class SplitLowRank(Pass):
    """Compute a low-rank part of each weight unrounded (SVDQuant, LoRC)."""

    name: ClassVar[str] = "split_low_rank"
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[tuple[str, ...]] = ("samples",)
    makes: ClassVar[tuple[str, ...]] = ("splits",)
    reads: ClassVar[tuple[str, ...]] = ("weights", "plan")

    rank: int = 8
    """Columns of A and rows of B."""
    method: Literal["svd", "residual", "best"] = "best"
    """What A B approximates: the weight, its rounding error, or what lowers the error more."""
    weighted: bool = True
    """Whether a channel counts as much as its inputs are large."""
    gain: float = 0.1
    """Share by which a layer's error must fall; a negative one lets it rise."""

    def run(self, edit: Edit, facts: Facts) -> None:
        require(self.name, "rank", self.rank, self.rank >= 1, "at least 1")
        require(self.name, "gain", self.gain, self.gain < 1, "below 1")
        for layer in layers(edit, facts, self.name):
            rows, width = layer.weight.shape
            if self.rank >= min(rows, width):
                why = f"its weight is {rows} × {width}; a part of rank {self.rank} is all of it"
                edit.skip(layer.site.node, why)
                continue
            error, a, b = self._best(layer)
            entries = self.rank * (rows + width)
            split = Split(
                f"part of rank {self.rank}",
                error,
                layer.bytes + entries * layer.dtype.itemsize,
                entries / (rows * width),
            )
            if accept(edit, layer, split, self.gain):
                _apply(edit, layer, a, b)

    def _best(self, layer: Layer) -> tuple[float, Tensor, Tensor]:
        """(error, A, B) with the lowest error among the turns."""
        weight, size = layer.weight, layer.x.pow(2).mean(0).sqrt()
        # A channel that is never on still has weights, and 1/d must stay finite.
        scale = size.clamp(min=float(size.max()) * 1e-3 or 1.0)
        scale = scale if self.weighted else torch.ones_like(scale)

        def attempt(target: Tensor) -> tuple[float, Tensor, Tensor]:
            a, b = (m.to(layer.dtype).float() for m in _decompose(target, scale, self.rank))
            found = computed(layer.x, weight - a @ b, layer.scheme)
            return layer.error(found, layer.x @ b.t() @ a.t()), a, b

        tried = [] if self.method == "residual" else [attempt(weight)]
        dense = weight
        for _ in range(0 if self.method == "svd" else TURNS):
            tried.append(attempt(weight - rounded(dense, layer.format)))
            dense = weight - tried[-1][1] @ tried[-1][2]
        return min(tried, key=lambda t: t[0])


def _decompose(target: Tensor, scale: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A, B of `rank` that minimise ‖ (target - A B) diag(scale) ‖, up to a randomised SVD's error.

    (Halko et al. 2011.) A full SVD of a large layer takes minutes, this one a few products.
    """
    extra = min(rank + 8, *target.shape)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(target * scale, q=extra, niter=4)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, (v[:, :rank] * root).t() / scale


def _apply(edit: Edit, layer: Layer, a: Tensor, b: Tensor) -> None:
    node, x = layer.site.node, layer.site.x
    assert x is not None
    left = edit.new_param(f"{layer.stem}.low_rank.a", a.to(layer.dtype), like=node)
    right = edit.new_param(f"{layer.stem}.low_rank.b", b.contiguous().to(layer.dtype), like=node)
    product = edit.call(aten.matmul.default, left, right, like=node)
    dense = edit.call(aten.sub.Tensor, layer.site.weight, product, like=node)
    first = main(edit, layer, x, dense)
    low = edit.call(aten.linear.default, x, right, like=node)
    join(edit, layer, first, edit.call(aten.linear.default, low, left, like=node))
