"""Cyclic coordinate descent on the output's error, over a grid that stays as it is.

    min over Q of  tr(E (H + λ I) Eᵀ),   E = W - Q
    q_j ← Q( w_j + Σ_{k≠j} (H_jk / H_jj) e_k ),   j = 1 … in, over and over

(QuantEase, Behdin et al. 2023, eq. 7.) Each step is the best choice of a column given the others,
so that the error never grows; it starts from GPTQ's result, which it improves, or from nearest. λ
is that of GPTQ: without it, few inputs are fitted at the expense of others. A column that no input
reaches is rounded to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcompiler.errors import BadInput
from qcompiler.formats import QTensor
from qcompiler.rounding.base import Layer, Need, Rounding, gram_of
from qcompiler.rounding.columns import hold, stepper, unhold
from qcompiler.rounding.gptq import Gptq
from qcompiler.rounding.search import By, fit

LEAF = 32
"""Columns between two matrix products with all errors."""


@dataclass(frozen=True, kw_only=True)
class QuantEase(Rounding):
    """Coordinate descent from where GPTQ, or rounding to nearest, ends."""

    name: ClassVar[str] = "quantease"
    needs: ClassVar[tuple[Need, ...]] = ("gram",)

    passes: int = 10
    """Rounds over all columns, at most; it ends when none changes."""
    start: Literal["gptq", "nearest"] = "gptq"
    """Whose result it starts from."""
    damping: float = 0.01
    """λ in units of the mean diagonal of H."""
    search: By = "none"
    """How ranges are found, as in `search`; see `gptq`."""

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise BadInput(f"quantease: passes is 1 or more, found {self.passes}")
        if not self.damping >= 0:
            raise BadInput(f"quantease: damping is 0 or more, found {self.damping}")

    def layer(self, layer: Layer) -> QTensor:
        gram, weight = gram_of(layer), layer.weight.float()
        if self.start == "gptq":
            first = Gptq(damping=self.damping, search=self.search).layer(layer)
        else:
            grid = fit(weight, layer.format, self.search, gram.diagonal())
            first = grid.quantize(weight)
        damped = gram.clone()
        damped.diagonal().add_(self.damping * gram.diagonal().mean())
        return descend(weight, damped, first, self.passes)


def descend(weight: Tensor, gram: Tensor, start: QTensor, passes: int) -> QTensor:
    """A matrix (out, in) on the grid of `start`, never worse than that.

    `gram` is (in, in); computes in the type of `weight`.
    """
    gram = gram.to(weight.dtype)
    work = _Work(weight, gram, start)
    before = work.loss()
    for _ in range(passes):
        old = work.codes.clone()
        for low in range(0, len(old), LEAF):
            work.round(low, min(low + LEAF, len(old)))
        if torch.equal(old, work.codes):
            break
    return hold(start.grid, work.codes) if work.loss() < before else start


class _Work:
    """A matrix on its way, transposed."""

    def __init__(self, weight: Tensor, gram: Tensor, start: QTensor) -> None:
        self.weight, self.gram = weight.t().contiguous(), gram
        self.codes = unhold(start, weight.dtype)
        self.rest = self.weight - start.dequantize(weight.dtype).t()
        """The errors e_j."""
        tiny = torch.finfo(gram.dtype).tiny
        self.share = gram / gram.diagonal().clamp_min(tiny)[:, None]
        """H_jk / H_jj, and 0 on the diagonal."""
        self.share.diagonal().zero_()
        self.step = stepper(start.grid, tuple(weight.shape), weight.dtype)

    def loss(self) -> float:
        """tr(E H Eᵀ)."""
        return float((self.gram @ self.rest * self.rest).sum(dtype=torch.float64))

    def round(self, low: int, high: int) -> None:
        """Choose columns `low` to `high` anew."""
        share, rest = self.share[low:high], self.rest
        target = torch.addmm(self.weight[low:high], share[:, :low], rest[:low])
        target.addmm_(share[:, high:], rest[high:])
        errors, share = rest[low:high].t(), share[:, low:high]
        for i, column in enumerate(range(low, high)):
            target[i].addmv_(errors, share[i])
            rest[column].copy_(self.weight[column])
            self.step(column, target[i], rest[column], self.codes[column])
