"""Affine maps: any invertible matrix before a layer, undone in its weight, trained for the plan.

    y = x Wᵀ = (x Tᵀ) (W T⁻¹)ᵀ        T = A ⊗ B at run time, any T where a producer takes it

AffineQuant (Ma et al. 2024) where the matrix folds: an invertible space (values to outputs of
attention, one matrix per head). With `online`, every other layer input takes two small matrices at
run time, FlatQuant (Sun et al. 2024, section 3.1): n = n₁ n₂ channels cost n (n₁ + n₂) and flatten
weights and activations alike. They start as identities and are trained through the quantized graph.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.learn import learn
from qcompiler.objective import OBJECTIVES, fitting
from qcompiler.passbase import Pass
from qcompiler.program import Program
from qcompiler.sites import Site, sites
from qcompiler.spaces import Group, inputs_of
from qcompiler.spaces.apply import apply_map, map_input
from qcompiler.spaces.demand import demand
from qcompiler.spaces.maps import Kronecker, Matrix


@dataclass(frozen=True, kw_only=True)
class Affine(Pass):
    """Train invertible maps before layers (AffineQuant), or Kronecker factors (FlatQuant)."""

    name: ClassVar[str] = "affine"
    effect: ClassVar[Effect] = Effect.EXACT
    makes: ClassVar[tuple[str, ...]] = ("rotation", "maps")
    reads: ClassVar[tuple[str, ...]] = ("weights", "plan")
    destroys: ClassVar[tuple[str, ...]] = ("scales", "shifts", "order", "splits")
    needs: ClassVar[tuple[str, ...]] = ("batches",)

    online: bool = False
    """Also map inputs that no parameter can be made to produce so, at run time."""
    steps: int = 100
    """Batches to train on; 0 leaves identities for `learn_rotation`."""
    rate: float = 1.0
    loss: Literal["auto", "kl_top", "mse"] = "auto"
    """What is made small; `auto` is `kl_top` for language models, else `mse`."""
    demand: tuple[str, ...] = ()
    """Patterns of weights that must take a map offline; if one cannot, nothing is done."""

    def needs_for(self, program: Program) -> tuple[str, ...]:
        return self.needs if self.steps else ()

    def run(self, edit: Edit, facts: Facts) -> None:
        program = facts.program
        if not program.plan:
            raise BadInput("affine trains for the plan's formats; put `assign` before it")
        if self.steps < 0 or not 0 < self.rate < math.inf:
            raise BadInput("affine: steps are 0 or more, and the rate is positive")
        found = inputs_of(program, "invertible")
        refused = dict(found.refusals)
        online = _by_input(program, refused) if self.online else []
        mapped = {site.id for group in online for site in group}
        for id, why in refused.items():
            if id not in mapped:
                edit.skip(id, why)
        demand(self.name, self.demand, [g.space for g in found.groups], found.blocked)
        if not self.steps:
            _insert(edit, found.groups, online, "identity")
            return
        trial = Edit(program, self.name)
        made = _insert(trial, found.groups, online, "trial")
        if not made:
            return
        loss = fitting(program) if self.loss == "auto" else self.loss
        learned = learn(
            trial.seal()[0],
            facts.batches,
            OBJECTIVES[loss],
            steps=self.steps,
            rate=self.rate,
            tick=facts.tick,
            only=made,
        )
        change = f"{loss} {learned.before:.4g} → {learned.after:.4g}"
        if not learned.after < learned.before:
            edit.note(f"training found nothing better: {change}")
            return
        words = f"trained with the others, {change}"
        _insert(edit, found.groups, online, words, learned.values)


def _by_input(program: Program, refused: Collection[str]) -> list[list[Site]]:
    """The refused linears that the plan rounds, those with one input together."""
    found: dict[fx.Node, list[Site]] = {}
    for site in sites(program.graph.nodes):
        linear = site.kind.name == "linear" and site.x is not None
        if linear and site.id in refused and site.id in program.plan:
            found.setdefault(site.x, []).append(site)  # type: ignore[arg-type]
    return list(found.values())


def _insert(
    edit: Edit,
    groups: Sequence[Group],
    online: Sequence[Sequence[Site]],
    words: str,
    values: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Put a map before each layer, with `values` or identities. Returns the parameters' names."""
    names: list[str] = []

    def value(name: str, *shape: int) -> Tensor:
        names.append(name)
        identity = torch.eye(shape[-1], dtype=torch.float64).expand(shape).clone()
        return identity if values is None else values[name]

    for number, group in enumerate(groups):
        space, name = group.space, f"affine.{number}"
        edit.spend(f"{space.size} × {space.size} before {group.names}: {words}")
        matrix = value(name, *space.maps, space.size, space.size)
        apply_map(edit, space, Matrix(edit, space.home, matrix, name, "invertible"))
    for number, readers in enumerate(online, len(groups)):
        name, (n1, n2) = f"affine.{number}", _factors(readers[0])
        edit.spend(f"{n1} ⊗ {n2} before {', '.join(s.id for s in readers)}: {words}")
        left, right = value(f"{name}.left", n1, n1), value(f"{name}.right", n2, n2)
        map_input(edit, readers, Kronecker(edit, readers[0].node, left, right, name))
    return names


def _factors(site: Site) -> tuple[int, int]:
    """n = n₁ n₂ with both as near to √n as can be."""
    n = int(site.weight.meta["val"].shape[1])
    first = next(d for d in range(int(n**0.5), 0, -1) if n % d == 0)
    return first, n // first
