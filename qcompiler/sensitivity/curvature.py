"""Curvature by Hessian-vector products.

    Ω = ½ tr(H_W)/n · ‖ΔW‖² + ½ tr(H_x)/n · ‖Δx‖²      `hessian`     (HAWQ-V2, Dong et al. 2020)
    Ω = ½ λ_max(H_W) · ‖ΔW‖²                            `eigenvalue`  (HAWQ, Dong et al. 2019)

tr(H_i) = E v_i · (Hv)_i for random signs v: one product Hv gives the draws of all sites at once,
weights and activations, since what other sites add vanishes in the mean (Hutchinson 1990). H is the
Hessian of the loss between the float program and itself, where its first derivative is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.samples import Flat
from qcompiler.sensitivity.base import Metric
from qcompiler.sensitivity.study import Study, rounded_input
from qcompiler.sensitivity.traced import Trace, trace


@dataclass(frozen=True, kw_only=True)
class Hessian(Metric):
    """Hutchinson's trace of each site's Hessian times the squared error of rounding."""

    name: ClassVar[str] = "hessian"
    forward: ClassVar[bool] = True
    random: ClassVar[bool] = True

    def sample(self, study: Study, batch: Flat, draw: int) -> Tensor:
        seen = trace(study, batch, "wx")
        weights, inputs = traces(study, batch, seen, draw)
        columns = []
        for id, site in study.sites.items():
            for scheme in study.candidates[id]:
                change = study.change(site, scheme.weight)
                loss = weights[id] / change.numel() * float(change.square().sum()) / 2
                if scheme.activation is not None and id in inputs:
                    x = seen.inputs[id]
                    moved = rounded_input(x, scheme.activation) - x
                    loss += inputs[id] / x.numel() * float(moved.square().sum()) / 2
                columns.append(loss)
        return torch.tensor([columns], dtype=torch.float64)


def traces(
    study: Study, batch: Flat, seen: Trace, draw: int
) -> tuple[dict[str, float], dict[str, float]]:
    """One draw of tr(H) of each site's weight, and of its input, by site id."""
    leaves = [*seen.weight.values(), *seen.x.values()]
    grads = _gradients(study, batch, seen, leaves)
    generator = torch.Generator().manual_seed(draw)
    signs = [torch.randint(0, 2, g.shape, generator=generator) * 2.0 - 1 for g in leaves]
    total = torch.stack([(g * v).sum() for g, v in zip(grads, signs, strict=True)]).sum()
    products = torch.autograd.grad(total, leaves, allow_unused=True)
    found = [
        0.0 if p is None else float((p.double() * v).sum())
        for p, v in zip(products, signs, strict=True)
    ]
    count = len(seen.weight)
    return dict(zip(seen.weight, found[:count], strict=True)), dict(
        zip(seen.x, found[count:], strict=True)
    )


def _gradients(study: Study, batch: Flat, seen: Trace, leaves: list[Tensor]) -> list[Tensor]:
    loss = study.compare(batch, study.program.flat(batch), seen.result)
    grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    return [
        torch.zeros_like(leaf, requires_grad=True) if g is None else g
        for leaf, g in zip(leaves, grads, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Eigenvalue(Metric):
    """The largest eigenvalue of each site's Hessian times the squared error of rounding; weights
    alone."""

    name: ClassVar[str] = "eigenvalue"
    forward: ClassVar[bool] = True
    random: ClassVar[bool] = True

    steps: int = 20
    """Steps of the power iteration, at most."""
    tolerance: float = 1e-2
    """Relative change of the eigenvalue at which it ends."""

    def sample(self, study: Study, batch: Flat, draw: int) -> Tensor:
        seen = trace(study, batch, "w")
        leaves = list(seen.weight.values())
        grads = dict(zip(seen.weight, _gradients(study, batch, seen, leaves), strict=True))
        columns = []
        for id, site in study.sites.items():
            value = self._largest(grads[id], seen.weight[id], draw)
            for scheme in study.candidates[id]:
                change = study.change(site, scheme.weight)
                columns.append(value * float(change.square().sum()) / 2)
        return torch.tensor([columns], dtype=torch.float64)

    def _largest(self, grad: Tensor, leaf: Tensor, draw: int) -> float:
        generator = torch.Generator().manual_seed(draw)
        v = torch.randn(leaf.shape, generator=generator)
        value = 0.0
        for _ in range(self.steps):
            v = v / v.norm().clamp_min(1e-30)
            (product,) = torch.autograd.grad((grad * v).sum(), leaf, retain_graph=True)
            before, value = value, float((product * v).sum())
            if abs(value - before) <= self.tolerance * abs(value):
                break
            v = product
        return value
