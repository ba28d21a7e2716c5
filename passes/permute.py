"""Permute: bring channels of like magnitude side by side, so that a group's scale fits all of it.

    order = argsort( E|x_j| · max|W_j| ),  x' = x[order],  W' = W[:, order]

Reordering by salience (QServe, Lin et al. 2024; Atom, Zhao et al. 2024; RPTQ, Yuan et al. 2023).
Whoever makes the channels makes them in the new order, so that nothing runs longer. It is of use to
formats with groups along the channels only, and must pay there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.facts import Facts
from qcompiler.formats import QFormat
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.program import Program
from qcompiler.sites import Site
from qcompiler.spaces import Group, inputs_of
from qcompiler.spaces.apply import apply_map, reordered
from qcompiler.spaces.demand import demand
from qcompiler.spaces.maps import Order
from qcompiler.spaces.trial import Change, channels_of, noise_under


@dataclass(frozen=True, kw_only=True)
class Permute(Pass):
    """Reorder channels by salience, so that groups hold channels of one size (Atom, QServe)."""

    name: ClassVar[str] = "permute"
    effect: ClassVar[Effect] = Effect.EXACT
    makes: ClassVar[tuple[str, ...]] = ("order",)
    reads: ClassVar[tuple[str, ...]] = ("weights", "plan")
    destroys: ClassVar[tuple[str, ...]] = ("splits",)
    needs: ClassVar[tuple[str, ...]] = ("activations", "samples")

    by: Literal["salience", "activation", "weight"] = "salience"
    demand: tuple[str, ...] = ()
    """Patterns of weights that must be reordered; if one cannot be, nothing is done."""

    def run(self, edit: Edit, facts: Facts) -> None:
        if not facts.program.plan:
            raise BadInput("permute: an order is for the plan's groups; put `assign` before it")
        found = inputs_of(facts.program, "permutation")
        for site, why in found.refusals:
            edit.skip(site, why)
        taken, left = [], []
        for number, group in enumerate(found.groups):
            facts.tick(number, len(found.groups))
            if not any(_grouped(facts.program, site) for site in group.sites):
                why = "its formats have no groups of channels; an order changes nothing"
                left.append((group.space, why))
                edit.skip(group.sites[0].id, why)
                continue
            order = torch.argsort(self._key(facts, group), descending=True)
            before = noise_under(facts, group, lambda site, x, w: (x, w))
            after = noise_under(facts, group, _reordered(group, order))
            words = f"noise {before:.3g} → {after:.3g}"
            if not after < before:
                left.append((group.space, f"another order of its inputs does not pay: {words}"))
                edit.skip(group.sites[0].id, left[-1][1])
                continue
            taken.append(group.space)
            makers = ", ".join(dict.fromkeys(m.name for m in group.space.params))
            edit.spend(f"inputs of {group.names} in order of {self.by}, in {makers}: {words}")
            apply_map(edit, group.space, Order(edit, group.space.home, order, f"permute.{number}"))
        demand(self.name, self.demand, taken, found.blocked, left)

    def _key(self, facts: Facts, group: Group) -> Tensor:
        """What channels are ordered by, (space.size,)."""
        x, w = torch.zeros(group.space.size), torch.zeros(group.space.size)
        for site in group.sites:
            value = facts.value(site.weight)
            assert value is not None
            largest = value.float().abs().movedim(1, 0).flatten(1).amax(1)
            x = torch.maximum(x, channels_of(facts.activation(site.id).absmean, group, site))
            w = torch.maximum(w, channels_of(largest, group, site))
        return {"activation": x, "weight": w, "salience": x * w}[self.by]


def _grouped(program: Program, site: Site) -> bool:
    """Whether a format of the site has several scales along its input channels."""
    scheme = program.plan.get(site.id)
    formats = () if scheme is None else (scheme.weight, scheme.activation)
    return any(_groups(f) for f in formats if f is not None)


def _groups(fmt: QFormat) -> bool:
    return fmt.block is not None and fmt.block[-1] != -1


def _reordered(group: Group, order: Tensor) -> Change:
    """What the order makes of a layer's inputs and weight."""

    def change(site: Site, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        where = reordered(group.member(site), order)
        return x[:, where], weight[:, where]

    return change
