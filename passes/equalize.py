"""Cross-layer equalization: weights of neighbouring layers get the same range in each channel.

    t_j = sqrt( max|W2_j| / max|W1_j| )        W1' = diag(t) W1,   W2' = W2 diag(1/t)

Nagel et al. 2019, eq. 11: after it both ranges are the geometric mean of the two. It needs no data.
Per-tensor scales of convolutions gain most. Layers are coupled (each reads one space and writes
another), so that it goes round until nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.spaces import Member, Space
from qcompiler.spaces import find as find_spaces
from qcompiler.spaces.apply import apply_scale, gather
from qcompiler.spaces.demand import demand
from qcompiler.spaces.trial import spread_tensor

STILL = 1e-3
"""Largest change of a scale, relative, that counts as none."""


@dataclass(frozen=True, kw_only=True)
class Equalize(Pass):
    """Equal weight ranges on both sides of every diagonal space (Nagel et al. 2019)."""

    name: ClassVar[str] = "equalize"
    effect: ClassVar[Effect] = Effect.EXACT
    makes: ClassVar[tuple[str, ...]] = ("scales", "maps")
    reads: ClassVar[tuple[str, ...]] = ("weights",)
    destroys: ClassVar[tuple[str, ...]] = ("splits",)

    rounds: int = 20
    """How often it goes over all spaces, at most."""
    demand: tuple[str, ...] = ()
    """Patterns of weights that must be equalized; if one cannot be, nothing is done."""

    def run(self, edit: Edit, facts: Facts) -> None:
        if self.rounds < 1:
            raise BadInput(f"equalize: rounds are positive; found {self.rounds}")
        everything = find_spaces(facts.program)
        found = [s for s in everything if not s.blocked_by and _sides(s)]
        refused = [s for s in everything if s.blocked_by and _sides(s)]
        for space in refused:
            first = space.blocked_by[0]
            edit.skip(first.node, f"{space.size} channels cannot be scaled: {first.reason}")
        weights = _weights(facts, found)
        scales = [torch.ones(space.size) for space in found]
        for turn in range(self.rounds):
            facts.tick(turn, self.rounds)
            moved = 0.0
            for number, space in enumerate(found):
                step = _step(weights, space)
                scales[number] = scales[number] * step
                moved = max(moved, float((step - 1).abs().max()))
                for member in space.params:
                    if member.node in weights:
                        factor = spread_tensor(step, member, 1.0) ** member.exponent
                        weights[member.node] = weights[member.node] * factor
            if moved < STILL:
                break
        for number, (space, scale) in enumerate(zip(found, scales, strict=True)):
            edit.spend(f"equal ranges in {_names(space.producers)} and {_names(space.consumers)}")
            apply_scale(edit, space, scale, f"equalize.{number}")
        demand(self.name, self.demand, found, refused)


def _names(side: tuple[Member, ...]) -> str:
    return ", ".join(dict.fromkeys(m.name for m in side if _matrix(m)))


def _matrix(member: Member) -> bool:
    """Whether it is a weight, not a bias or a gain."""
    return int(member.node.meta["val"].ndim) >= 2


def _sides(space: Space) -> bool:
    return any(map(_matrix, space.producers)) and any(map(_matrix, space.consumers))


def _weights(facts: Facts, spaces: list[Space]) -> dict[fx.Node, Tensor]:
    """Magnitudes of all weights of the spaces."""
    found: dict[fx.Node, Tensor] = {}
    for member in (m for space in spaces for m in space.params if _matrix(m)):
        if member.node not in found:
            value = facts.value(member.node)
            assert value is not None
            found[member.node] = value.abs().float()
    return found


def _step(weights: dict[fx.Node, Tensor], space: Space) -> Tensor:
    """sqrt(r2 / r1) per free channel; 1 where a channel is dead."""
    ranges = []
    for side in (space.producers, space.consumers):
        largest = torch.zeros(space.size)
        for member in filter(_matrix, side):
            value = weights[member.node]
            reduced = [a for a in range(value.ndim) if member.index.shape[a] == 1]
            value = value.amax(reduced, keepdim=True) if reduced else value
            largest = torch.maximum(largest, gather(value, member, space.size))
        ranges.append(largest)
    first, second = ranges
    alive = (first > 0) & (second > 0)
    return torch.where(alive, (second / first.clamp(min=1e-30)).sqrt(), torch.ones_like(first))
