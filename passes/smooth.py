"""SmoothQuant on channel spaces: move magnitude from activations into weights.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)        x' = x / s,  W' = W diag(s)

(Xiao et al. 2023, eq. 4.) The maximum over the weight is over all readers of that activation. Where
1/s goes is no table of module names: each diagonal `Space` says which parameters produce the
channels (a norm's gain and bias, up_proj's rows, v_proj's rows) and which read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.sites import Site, sites
from qcompiler.spaces import Space
from qcompiler.spaces import find as find_spaces
from qcompiler.spaces.apply import apply_scale, gather

FLOOR = 1e-5
"""Smallest maximum of a channel; dead channels would otherwise get an infinite scale."""


@dataclass(frozen=True, kw_only=True)
class Smooth(Pass):
    """Scale activation outliers down and the weights that read them up (SmoothQuant)."""

    name: ClassVar[str] = "smooth"
    effect: ClassVar[Effect] = Effect.EXACT
    makes: ClassVar[tuple[str, ...]] = ("scales", "maps")
    reads: ClassVar[tuple[str, ...]] = ("weights",)
    destroys: ClassVar[tuple[str, ...]] = ("splits",)
    needs: ClassVar[tuple[str, ...]] = ("activations",)

    alpha: float = 0.5
    """Share of the difficulty that moves to the weights: 0 none, 1 all of it."""

    def run(self, edit: Edit, facts: Facts) -> None:
        if not 0 <= self.alpha <= 1:
            raise BadInput(f"smooth: alpha is between 0 and 1; found {self.alpha}")
        found = find_spaces(facts.program)
        readers = [s for s in sites(facts.program.graph.nodes) if s.x is not None]
        chosen: dict[int, tuple[Space, list[Site]]] = {}
        for site in readers:
            space = _best_space(found, site)
            if space is None:
                edit.skip(site.id, _why_not(found, site))
            else:
                chosen.setdefault(space.id, (space, []))[1].append(site)
        for number, (space, group) in enumerate(chosen.values()):
            producers = ", ".join(m.name for m in space.producers)
            edit.spend(f"inputs of {', '.join(s.id for s in group)} take 1/s from {producers}")
            apply_scale(edit, space, 1 / self._scale(facts, space, group), f"smooth.{number}")

    def _scale(self, facts: Facts, space: Space, group: list[Site]) -> Tensor:
        """s, one per free channel of the space."""
        activation = torch.zeros(space.size)
        for site in group:
            member = next(m for m in space.activations if m.node is site.x)
            shape = [1] * member.index.ndim
            shape[site.kind.channel] = -1
            seen = facts.activation(site.id).absmax.reshape(shape)
            activation = torch.maximum(activation, gather(seen, member, space.size))
        weight = torch.zeros(space.size)
        for member in space.consumers:
            weight_value = facts.value(member.node)
            assert weight_value is not None
            value = weight_value.abs()
            reduced = [a for a in range(value.ndim) if member.index.shape[a] == 1]
            largest = value.amax(reduced, keepdim=True) if reduced else value
            weight = torch.maximum(weight, gather(largest, member, space.size))
        scale = activation.clamp(min=FLOOR) ** self.alpha / weight.clamp(min=FLOOR) ** (
            1 - self.alpha
        )
        return torch.where(activation > FLOOR, scale, torch.ones_like(scale))


def _best_space(found: list[Space], site: Site) -> Space | None:
    """The free space with the most factors on the site's input channels, then the fewest edges."""
    fitting = [
        s
        for s in found
        if not s.blocked_by and s.producers and s.consumers and _carries(s, site, exponent=1)
    ]
    return max(fitting, key=lambda s: (s.size, -len(s.params)), default=None)


def _carries(space: Space, site: Site, exponent: int | None = None) -> bool:
    """Whether the space scales the channels that the site contracts."""
    for member in space.activations:
        if member.node is site.x and exponent in (None, member.exponent):
            return member.index.shape[site.kind.channel] > 1
    return False


def _why_not(found: list[Space], site: Site) -> str:
    blockers = [b for s in found if s.blocked_by and _carries(s, site) for b in s.blocked_by]
    if not blockers:
        return "no parameter before it could absorb a scale of its input channels"
    first = blockers[0]
    more = f" (and {len(blockers) - 1} more)" if len(blockers) > 1 else ""
    return f"its input channels cannot be scaled: {first.reason} at {first.node}{more}"
