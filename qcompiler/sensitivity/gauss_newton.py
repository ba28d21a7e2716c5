"""The loss to second order along what rounding really does to a site's output.

    loss = E (Σ_s ∂s/∂y · Δy)²        Δy = Q(x) Q(W)ᵀ - x Wᵀ        (s: see `scores.py`)

which is ½ Δᵀ J ᵀ H J Δ with the whole Gauss-Newton matrix of the site, not its diagonal or trace,
and holds for weights and activations together. One pass back serves all sites and all schemes; each
sample of a batch is a draw of its own. With `by="element"` it is Σ (∂s/∂y ∘ Δy)², the score of
NVIDIA Model-Optimizer's AutoQuantize, with `by="token"` between the two.

Two sites at once cost 2 E (∂s · Δ_i)(∂s · Δ_j) beyond the sum of both (an augmented Hessian's
off-diagonal terms), which the same draws tell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcompiler.samples import Flat
from qcompiler.sensitivity.base import Metric
from qcompiler.sensitivity.scores import score
from qcompiler.sensitivity.study import Study, rounded_input
from qcompiler.sensitivity.traced import call, trace
from qcompiler.sites import Site


@dataclass(frozen=True, kw_only=True)
class GaussNewton(Metric):
    """Second order, along the change of each site's output."""

    name: ClassVar[str] = "gauss_newton"
    forward: ClassVar[bool] = True
    random: ClassVar[bool] = True

    by: Literal["sample", "token", "element"] = "sample"
    """What is summed before it is squared."""

    @property
    def roots(self) -> bool:
        return self.by == "sample"

    def sample(self, study: Study, batch: Flat, draw: int) -> Tensor:
        seen = trace(study, batch, "y")
        leaves = list(seen.y.values())
        wanted = score(study, batch, seen.result, draw)
        grads = torch.autograd.grad(wanted, leaves, allow_unused=True)
        felt = {
            id: torch.zeros_like(leaf) if grad is None else grad
            for (id, leaf), grad in zip(seen.y.items(), grads, strict=True)
        }
        size = _samples(list(felt.values()))
        columns = []
        with torch.no_grad():
            for id, site in study.sites.items():
                if self.roots and site.kind.name == "linear":
                    columns += _by_gradient(study, site, seen.inputs[id], felt[id], size)
                    continue
                for scheme in study.candidates[id]:
                    x = seen.inputs.get(id)
                    moved = None if x is None else rounded_input(x, scheme.activation)
                    weight = study.rounded(site, scheme.weight)
                    change = call(site, seen.arguments[id], moved, weight) - seen.outputs[id]
                    columns.append(self._gather((felt[id] * change).double(), size))
        return torch.stack(columns, 1)

    def _gather(self, product: Tensor, size: int) -> Tensor:
        """Sums for each sample; their mean (of squares) is the batch's loss."""
        rows = product.reshape(size, -1, product.shape[-1])
        if self.by == "sample":
            return rows.sum((1, 2)) * math.sqrt(size)
        inner = rows.sum(-1) if self.by == "token" else rows
        return inner.square().flatten(1).sum(1) * size


def _by_gradient(study: Study, site: Site, x: Tensor, felt: Tensor, size: int) -> list[Tensor]:
    """The same sums of a linear, by each sample's gradient Gᵀx of the weight, which is one product
    for all schemes: ⟨G, Q(x) Q(W)ᵀ - x Wᵀ⟩ = ⟨Gᵀx, ΔW⟩ + ⟨GᵀΔx, Q(W)⟩."""
    schemes = study.candidates[site.id]
    moves = {s.activation: rounded_input(x, s.activation) - x for s in schemes if s.activation}
    found = torch.zeros(len(schemes), size, dtype=torch.float64)
    rows = felt.reshape(size, -1, felt.shape[-1]).float()
    plain = x.reshape(size, -1, x.shape[-1]).float()
    for sample in range(size):
        gradient = rows[sample].T @ plain[sample]
        moved = {
            fmt: rows[sample].T @ change.reshape(plain.shape)[sample].float()
            for fmt, change in moves.items()
        }
        for k, scheme in enumerate(schemes):
            if scheme.weight is not None:
                found[k, sample] += (gradient * study.change(site, scheme.weight)).sum()
            if scheme.activation is not None:
                weight = study.rounded(site, scheme.weight)
                found[k, sample] += (moved[scheme.activation] * weight).sum()
    return list(found * math.sqrt(size))


def _samples(values: list[Tensor]) -> int:
    """Samples that all sites keep apart on their first axis; 1 if they do not."""
    sizes = {v.shape[0] if v.ndim > 1 else 1 for v in values}
    return sizes.pop() if len(sizes) == 1 else 1
