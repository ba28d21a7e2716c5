"""What can be seen without derivatives.

loss = ‖ Q(x) Q(W)ᵀ - x Wᵀ ‖² / ‖ x Wᵀ ‖²                `error`: 1 / SQNR of the layer's output
loss = loss( float program, one site of it rounded )      `divergence`: KL, or squared error
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompiler.formats import Scheme
from qcompiler.padding import rows
from qcompiler.samples import Flat
from qcompiler.sensitivity.base import Metric
from qcompiler.sensitivity.study import Study, rounded_input
from qcompiler.sensitivity.traced import call, trace
from qcompiler.sites import Site


@dataclass(frozen=True, kw_only=True)
class Error(Metric):
    """Relative squared error of the layer's own output; it knows nothing of the layers behind."""

    name: ClassVar[str] = "error"

    def sample(self, study: Study, batch: Flat, draw: int) -> Tensor:
        seen = trace(study, batch)
        columns = []
        counts = study.padding.counts(batch)
        for id, site in study.sites.items():
            y = rows(seen.outputs[id], counts)
            size = float(y.double().square().sum()) or 1.0
            for scheme in study.candidates[id]:
                x = seen.inputs.get(id)
                moved = None if x is None else rounded_input(x, scheme.activation)
                found = call(site, seen.arguments[id], moved, study.rounded(site, scheme.weight))
                found = rows(found, counts)
                columns.append(float((found - y).double().square().sum()) / size)
        return torch.tensor([columns], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Divergence(Metric):
    """The loss itself, one scheme of one site at a time: a run of the program for each column."""

    name: ClassVar[str] = "divergence"
    forward: ClassVar[bool] = True

    def sample(self, study: Study, batch: Flat, draw: int) -> Tensor:
        wanted = study.program.flat(batch)
        columns = [
            float(study.compare(batch, wanted, Rounded(study, {id: scheme}).run_on(batch)))
            if scheme.weight is not None or scheme.activation is not None
            else 0.0
            for id in study.sites
            for scheme in study.candidates[id]
        ]
        return torch.tensor([columns], dtype=torch.float64)


class Rounded(fx.Interpreter):
    """The program with some sites rounded to nearest."""

    def __init__(self, study: Study, schemes: dict[str, Scheme]) -> None:
        super().__init__(study.program.function)  # type: ignore[arg-type]
        self._study, self._schemes = study, schemes

    def run_on(self, batch: Flat) -> tuple[object, ...]:
        params = [self._study.program.params[n] for n in self._study.program.slots.values()]
        with torch.no_grad():
            return tuple(self.run(*params, *batch))

    def run_node(self, n: fx.Node) -> object:
        site = self._study.nodes.get(n)
        scheme = None if site is None else self._schemes.get(site.id)
        if site is None or scheme is None:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        return self._call(site, scheme, args)

    def _call(self, site: Site, scheme: Scheme, args: tuple[object, ...]) -> Tensor:
        moved = None
        if site.kind.x is not None and scheme.activation is not None:
            x = args[site.kind.x]
            assert isinstance(x, Tensor)
            moved = rounded_input(x, scheme.activation)
        return call(site, args, moved, self._study.rounded(site, scheme.weight))
