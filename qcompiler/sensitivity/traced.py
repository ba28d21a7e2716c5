"""A run of a program that gradients go back through, with a look at every site.

    y_i = site_i( x_i + ε_i, W_i + δ_i ) + η_i

ε, δ and η are zeros that a metric asks for: what the loss's derivatives are taken by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from qcompiler.samples import Flat
from qcompiler.sensitivity.study import Study
from qcompiler.sites import Site


@dataclass(eq=False)
class Trace:
    """What one run met, by site id."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    """x of each site, where it is a floating point tensor."""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """All of each site's arguments, for `Study` to call it again."""
    x: dict[str, Tensor] = field(default_factory=dict)
    """ε"""
    weight: dict[str, Tensor] = field(default_factory=dict)
    """δ"""
    y: dict[str, Tensor] = field(default_factory=dict)
    """η"""
    result: tuple[object, ...] = ()


def trace(study: Study, batch: Flat, leaves: str = "") -> Trace:
    """Run the program on `batch`; `leaves` names the zeros to add, of `x`, `w` and `y`.

    Attention runs in its plain form, which alone has second derivatives.
    """
    program = study.program
    run = _Run(study, leaves)
    params = [program.params[name] for name in program.slots.values()]
    with torch.set_grad_enabled(bool(leaves)), sdpa_kernel(SDPBackend.MATH):
        run.found.result = tuple(run.run(*params, *batch))
    return run.found


def call(site: Site, arguments: tuple[Any, ...], x: Tensor | None, weight: Tensor) -> Tensor:
    """A site's output with another input (None: its own) and another weight (rows or shaped)."""
    new = list(arguments)
    old = new[site.kind.weight]
    new[site.kind.weight] = weight.reshape(old.shape).to(old.dtype)
    if x is not None and site.kind.x is not None:
        new[site.kind.x] = x
    found: Tensor = site.node.target(*new, **_keywords(site))  # type: ignore[operator]
    return found


def _keywords(site: Site) -> Mapping[str, Any]:
    if any(isinstance(v, fx.Node) for v in site.node.kwargs.values()):
        raise AssertionError(f"{site.id} has tensors among its keywords")
    return site.node.kwargs


class _Run(fx.Interpreter):
    def __init__(self, study: Study, leaves: str) -> None:
        super().__init__(study.program.function)  # type: ignore[arg-type]
        self._study, self._leaves, self.found = study, leaves, Trace()

    def run_node(self, n: fx.Node) -> object:
        site = self._study.nodes.get(n)
        if site is None:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        found, id = self.found, site.id
        x, weight = None, args[site.kind.weight]
        if site.kind.x is not None:
            x = args[site.kind.x]
            found.inputs[id] = x.detach()
            if "x" in self._leaves:
                found.x[id] = torch.zeros_like(x).requires_grad_()
                x = x + found.x[id]
        if "w" in self._leaves:
            found.weight[id] = torch.zeros_like(weight).requires_grad_()
            weight = weight + found.weight[id]
        found.arguments[id] = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        y = call(site, tuple(args), x, weight)
        found.outputs[id] = y.detach()
        if "y" in self._leaves:
            found.y[id] = torch.zeros_like(y).requires_grad_()
            y = y + found.y[id]
        return y
