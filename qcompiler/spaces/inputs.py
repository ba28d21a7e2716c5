"""The spaces through which the inputs of layers can be changed, and who reads through each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompiler.program import Program
from qcompiler.sites import Site, sites
from qcompiler.spaces.kinds import find
from qcompiler.spaces.system import Member, Space


@dataclass(frozen=True)
class Group:
    """A free space, and the layers that contract its channels."""

    space: Space
    sites: tuple[Site, ...]

    @property
    def names(self) -> str:
        """The layers, by id."""
        return ", ".join(s.id for s in self.sites)

    def member(self, site: Site) -> Member:
        """The layer's input as a member of the space."""
        found = carrier(self.space, site)
        assert found is not None
        return found


@dataclass(frozen=True)
class Inputs:
    """All groups of one kind of map in a program, and why other layers are in none."""

    groups: tuple[Group, ...]
    refusals: tuple[tuple[str, str], ...]
    """(layer, reason)"""
    blocked: tuple[Space, ...]
    """Spaces of the refused layers' inputs."""


def inputs_of(program: Program, kind: str) -> Inputs:
    """The free space of each layer's input with the most freedom, that a parameter produces."""
    found = find(program, kind)
    chosen: dict[int, tuple[Space, list[Site]]] = {}
    refusals: list[tuple[str, str]] = []
    blocked: list[Space] = []
    for site in sites(program.graph.nodes):
        if site.x is None:
            continue
        carrying = [s for s in found if carrier(s, site, (1, -1)) is not None]
        free = [s for s in carrying if not s.blocked_by and carrier(s, site)]
        free = [s for s in free if s.producers and s.consumers]
        best = max(free, key=_freedom, default=None)
        if best is None:
            blocked += [s for s in carrying if s.blocked_by]
            refusals.append((site.id, _why_not(carrying)))
        else:
            chosen.setdefault(best.id, (best, []))[1].append(site)
    groups = tuple(Group(space, tuple(group)) for space, group in chosen.values())
    return Inputs(groups, tuple(refusals), tuple(blocked))


def carrier(space: Space, site: Site, exponents: Sequence[int] = (1,)) -> Member | None:
    """The site's input as a member of the space, if its contracted channels are the space's."""
    assert site.x is not None
    axis = site.kind.channel % site.x.meta["val"].ndim
    for member in space.activations:
        if member.node is site.x and member.axis == axis and member.exponent in exponents:
            return member
    return None


def _freedom(space: Space) -> tuple[int, int]:
    return space.size, -len(space.params)


def _why_not(carrying: list[Space]) -> str:
    blockers = [b for s in carrying for b in s.blocked_by]
    if not blockers:
        return "no parameter before it could absorb a change of its input channels"
    first = blockers[0]
    more = f" (and {len(blockers) - 1} more)" if len(blockers) > 1 else ""
    return f"its input channels cannot be changed: {first.reason} at {first.node}{more}"
