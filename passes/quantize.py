"""Carry out the plan: store weights as integers, round activations where they are read.

    y = linear( fakequant(x), dequantize(q, s), b )        q = clamp(round(W / s))

(Jacob et al. 2018, eq. 1.) The result is the *reference* program: every backend kernel is compared
with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.facts import Facts
from qcompiler.formats import Grid, QFormat
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.program import Program
from qcompiler.registry import get_rounding
from qcompiler.rounding import Inputs, Layer
from qcompiler.sites import Site, sites
from qcompiler.stored import write

aten = torch.ops.aten
qc = torch.ops.qc


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Replace weights by integers and round activations, as the plan says."""

    name: ClassVar[str] = "quantize"
    effect: ClassVar[Effect] = Effect.LOSSY
    reads: ClassVar[tuple[str, ...]] = ("plan",)
    ends: ClassVar[tuple[str, ...]] = ("weights",)
    needs: ClassVar[tuple[str, ...]] = ("activations",)

    rounding: str = "nearest"
    budget: float = 1.0
    """Largest relative error of an output against the program before; 1 is as wrong as zero."""

    def needs_for(self, program: Program) -> tuple[str, ...]:
        """Only static activations need calibration."""
        static = any(s.activation and not s.activation.dynamic for s in program.plan.values())
        return self.needs if static else ()

    def tolerance(self, facts: Facts) -> float:
        return self.budget

    def run(self, edit: Edit, facts: Facts) -> None:
        plan = edit.plan
        if not plan:
            raise BadInput("quantize: the plan is empty; put `assign` before it")
        weights: dict[tuple[fx.Node, QFormat], fx.Node] = {}
        inputs: dict[tuple[fx.Node, QFormat], fx.Node] = {}
        for site in sites(edit.nodes):
            scheme = plan.get(site.id)
            if scheme is None:
                continue
            if scheme.weight and edit.param_of(site.weight) is None:
                edit.skip(
                    site.node, "its weight is still an expression; put `fold` before quantize"
                )
                continue
            edit.spend(f"stored and computed as the plan says: {scheme}", site.node)
            if scheme.weight:
                key = (site.weight, scheme.weight)
                if key not in weights:
                    weights[key] = self._weight(edit, facts, site, scheme.weight)
                edit.rewire(site.node, site.kind.weight, weights[key])
            if scheme.activation and site.x is not None and site.kind.x is not None:
                key = (site.x, scheme.activation)
                if key not in inputs:
                    inputs[key] = _input(edit, facts, site, scheme.activation)
                edit.rewire(site.node, site.kind.x, inputs[key])

    def _weight(self, edit: Edit, facts: Facts, site: Site, fmt: QFormat) -> fx.Node:
        """dequantize(packed, scale) in the type and shape of the weight it replaces."""
        node = site.weight
        name = str(edit.param_of(node))
        value = edit.tensor(node)
        # Rows are flattened, so that a 3 × 3 kernel packs as densely as a matrix.
        rows = value.reshape(value.shape[0], -1)
        flat = fmt if fmt.block is None or len(fmt.block) == 1 else replace(fmt, block=(-1,))
        inputs = Inputs(facts.activations.get(site.id))
        q = get_rounding(self.rounding).layer(Layer(site.id, rows.float(), flat, inputs))
        new = write(edit, q, name, value.dtype, of=node, like=site.node)
        if value.ndim != 2:
            new = edit.call(aten.reshape.default, new, list(value.shape), like=site.node)
        return new


def _input(edit: Edit, facts: Facts, site: Site, fmt: QFormat) -> fx.Node:
    assert site.x is not None
    if fmt.dynamic:
        return edit.call(qc.fake_quantize.default, site.x, str(fmt), like=site.node)
    if fmt.block is not None:
        raise BadInput(f"a static activation has one scale per tensor; found {fmt} at {site.id}")
    seen = facts.activation(site.id)
    grid = Grid.cover(torch.tensor(seen.low), torch.tensor(seen.high), fmt)
    stem = f"{site.id.rpartition('/')[0] or site.id}.input"
    scale_node = edit.new_param(f"{stem}_scale", grid.scale, like=site.node)
    zero = grid.zero
    zero_node = None if zero is None else edit.new_param(f"{stem}_zero", zero, like=site.node)
    return edit.call(
        qc.fake_quantize.default, site.x, str(fmt), scale_node, zero_node, like=site.node
    )
