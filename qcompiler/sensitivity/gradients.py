"""First derivatives by element.

    loss = Σ E (∂s/∂W ∘ ΔW)² + Σ E (∂s/∂x ∘ Δx)²       `fisher`, its diagonal (Kunstner et al. 2019)
    loss = Σ |∂s/∂W ∘ ΔW| + Σ |∂s/∂x ∘ Δx|              `taylor` (auto-round's AutoScheme)

s is that of `scores.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.samples import Flat
from qcompiler.sensitivity.base import Metric
from qcompiler.sensitivity.scores import score
from qcompiler.sensitivity.study import Study, rounded_input
from qcompiler.sensitivity.traced import trace


@dataclass(frozen=True, kw_only=True)
class Fisher(Metric):
    """Second order along each weight and each input number for itself."""

    name: ClassVar[str] = "fisher"
    forward: ClassVar[bool] = True
    random: ClassVar[bool] = True
    power: ClassVar[int] = 2

    def sample(self, study: Study, batch: Flat, draw: int) -> Tensor:
        seen = trace(study, batch, "wx")
        leaves = {("w", id): leaf for id, leaf in seen.weight.items()}
        leaves |= {("x", id): leaf for id, leaf in seen.x.items()}
        found = torch.autograd.grad(
            score(study, batch, seen.result, draw), list(leaves.values()), allow_unused=True
        )
        grads = dict(zip(leaves, found, strict=True))
        columns = []
        for id, site in study.sites.items():
            for scheme in study.candidates[id]:
                loss = self._product(grads["w", id], study.change(site, scheme.weight))
                if scheme.activation is not None and id in seen.inputs:
                    x = seen.inputs[id]
                    moved = rounded_input(x, scheme.activation) - x
                    loss += self._product(grads["x", id], moved)
                columns.append(loss)
        return torch.tensor([columns], dtype=torch.float64)

    def _product(self, grad: Tensor | None, change: Tensor) -> float:
        if grad is None:
            return 0.0
        return float((grad.double() * change).abs().pow(self.power).sum())


@dataclass(frozen=True, kw_only=True)
class Taylor(Fisher):
    """First order, each product by its magnitude."""

    name: ClassVar[str] = "taylor"
    forward: ClassVar[bool] = False
    power: ClassVar[int] = 1
