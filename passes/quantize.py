"""Carry out the plan: store weights as codes, round activations where they are read.

    y = linear( fakequant(x), dequantize(q, s), b )        q = clamp(round(W / s))

(Jacob et al. 2018, eq. 1.) Which codes, is the business of the `rounding`; which scales activations
get, that of `ranges` and `cross`. The result is the *reference* program: every backend kernel is
compared with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcompiler.activations import InputRounding, Rounder
from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.facts import Facts
from qcompiler.formats import QFormat, Scheme
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.program import Program
from qcompiler.registry import get_rounding
from qcompiler.rounding.bias import bias_correction
from qcompiler.schemes import why_not
from qcompiler.sites import Site, sites
from qcompiler.state import Solved, remarks
from qcompiler.stored import write

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Replace weights by codes and round activations, as the plan says."""

    name: ClassVar[str] = "quantize"
    effect: ClassVar[Effect] = Effect.LOSSY
    reads: ClassVar[tuple[str, ...]] = ("plan",)
    ends: ClassVar[tuple[str, ...]] = ("weights",)

    rounding: str = "nearest"
    """How codes are found: a name, with options in braces: `"gptq{damping=0.05}"`."""
    ranges: str = "minmax"
    """Range of a static activation: minmax, percentile, mse or entropy."""
    cross: float = 0.0
    """Scale dynamic activations per token × channel with this exponent (CrossQuant: 0.15)."""
    bias_correction: bool = False
    """Take the mean error of each output off, in the bias (Nagel et al. 2019)."""
    budget: float = 1.0
    """Largest relative error of an output against the program before; 1 is as wrong as zero."""

    def needs_for(self, program: Program) -> tuple[str, ...]:
        """Data only for what asks for them: static activations, roundings that optimize."""
        rounding = get_rounding(self.rounding).needed()
        schemes = program.plan.values()
        inputs = [f for s in schemes for f in (s.activation, s.key, s.value) if f is not None]
        found = self._inputs.needs(inputs)
        if any(s.weight is not None for s in schemes):
            found |= {"batches"} if rounding else set()
            found |= {"fisher"} if "fisher" in rounding else set()
            found |= {"activations"} if self.bias_correction else set()
        return tuple(sorted(found))

    def tolerance(self, facts: Facts) -> float:
        return self.budget

    @property
    def _inputs(self) -> InputRounding:
        return InputRounding(self.ranges, self.cross)

    def run(self, edit: Edit, facts: Facts) -> None:
        plan = edit.plan
        if not plan:
            raise BadInput("quantize: the plan is empty; put `assign` before it")
        rounding = get_rounding(self.rounding)
        solved = facts.solve(rounding, self._with_rounded_inputs(facts))
        weights: dict[tuple[fx.Node, QFormat], fx.Node] = {}
        inputs = Rounder(self._inputs, edit, facts)
        for site in sites(edit.nodes):
            scheme = plan.get(site.id)
            if scheme is None:
                continue
            if scheme.weight and site.id not in solved:
                why = why_not(site, edit.is_weight)
                edit.skip(
                    site.node,
                    why or "its weight is still an expression; put `fold` before quantize",
                )
                continue
            words = f"stored and computed as the plan says: {scheme}"
            if site.id in solved:
                words += solved[site.id].words
            edit.spend(words, site.node)
            if scheme.weight:
                key = (site.weight, scheme.weight)
                if key not in weights:
                    weights[key] = _weight(edit, site, solved[site.id])
                if self.bias_correction and site.kind.bias is not None:
                    _correct(edit, facts, site, solved[site.id])
                edit.rewire(site.node, site.kind.weight, weights[key])
            inputs.input(site, scheme)
        inputs.attention()
        inputs.sums()
        for text in remarks(solved, "gram" in rounding.needed()):
            edit.note(text)

    def _with_rounded_inputs(self, facts: Facts) -> Program:
        """The program as its weights will see it."""
        scratch = Edit(facts.program, self.name)
        scratch.spend("activations as the plan says")
        inputs = Rounder(self._inputs, scratch, facts)
        for site in sites(scratch.nodes):
            inputs.input(site, scratch.plan.get(site.id, Scheme()))
        inputs.attention()
        inputs.sums()
        return scratch.seal()[0]


def _weight(edit: Edit, site: Site, solved: Solved) -> fx.Node:
    """What decodes the codes, in the type and shape of the weight it replaces."""
    node, value = site.weight, edit.tensor(site.weight)
    name = str(edit.param_of(node))
    new = write(edit, solved.weight, name, value.dtype, of=node, like=site.node)
    if value.ndim != 2:
        # Rows are flattened, so that a 3 × 3 kernel packs as densely as a matrix.
        new = edit.call(aten.reshape.default, new, list(value.shape), like=site.node)
    return new


def _correct(edit: Edit, facts: Facts, site: Site, solved: Solved) -> None:
    """Add what the rounding of the weight takes from the mean of each output to the bias."""
    out, width = site.weight.meta["val"].shape[:2]
    weight = edit.tensor(site.weight).float().reshape(out, width, -1).sum(-1)
    rounded = solved.weight.dequantize().reshape(out, width, -1).sum(-1)
    mean = facts.activation(site.id).mean
    groups = len(mean) // weight.shape[1]
    if groups > 1:  # each group of rows reads channels of its own
        mean = mean.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    shift = bias_correction(weight, rounded, mean).to(edit.tensor(site.weight).dtype)
    if site.bias is None:
        stem = site.id.rpartition("/")[0] or site.id
        new = edit.new_param(f"{stem}.bias", shift, like=site.node)
    else:
        param = edit.new_param(
            f"{edit.param_of(site.bias) or site.id}.shift", shift, like=site.node
        )
        new = edit.call(aten.add.Tensor, site.bias, param, like=site.node)
    assert site.kind.bias is not None
    edit.rewire(site.node, site.kind.bias, new)
