"""Shifts: where a vector may be added to the channels of a value and taken off by its readers.

    y = x Wᵀ + b = (x + s) Wᵀ + (b - s Wᵀ)          whoever makes x adds s to its own bias

Outlier Suppression+ (Wei et al. 2023), section 4.1. The unknowns are shifts, one vector per leaf. A
linear layer takes any shift on either side in its bias, so it constrains nothing; views pass a
shift on; a sum adds up the shifts of its summands; attention's output is an average of the values
and is shifted as they are. Nothing passes what is not linear, nor a norm, nor a product.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import ClassVar

from torch import fx

from qcompiler.program import op_name
from qcompiler.spaces.axes import Absorbed, Axes, Letter, Product, Value
from qcompiler.spaces.linear import LinearSystem, Term, fixed_axes, flat_index, size_of
from qcompiler.spaces.system import Leaf, Member, Space, around, row_of
from qcompiler.spaces.terms import Atom


def shift_spaces(axes: Axes) -> list[Space]:
    """All spaces of shifts that a bias or an added parameter can take, blocked ones included."""
    system = _Shifts(axes)
    found: list[Space] = []
    for root, members in system.solutions().items():
        space = _space(axes, system, len(found), root, members)
        if space is not None:
            found.append(space)
    # One index of a shift, over heads, is part of the whole that may differ by head and channel.
    free = {_sites(s) for s in found if not s.blocked_by}
    kept = [s for s in found if not s.blocked_by or _sites(s) not in free]
    return [replace(s, id=i) for i, s in enumerate(kept)]


def _sites(space: Space) -> frozenset[tuple[fx.Node, int]]:
    return frozenset((m.node, m.exponent) for m in space.params)


class _Shifts(LinearSystem):
    kind: ClassVar[str] = "shift"

    def __init__(self, axes: Axes) -> None:
        self.sites: dict[Leaf, list[tuple[fx.Node, bool]]] = defaultdict(list)
        """Leaf → operators whose bias takes its shift, and whether they make the value."""
        self._sums: dict[Value, list[Product]] = defaultdict(list)
        super().__init__(axes)

    def equation(self, node: fx.Node, operands: list[Leaf], results: list[Leaf]) -> None:
        """Sums are read as a whole (see `finish`), and nothing else is a product for shifts."""

    def alone(self, leaf: Leaf, node: fx.Node, summed: bool) -> None:
        self.zero(leaf, node, "nothing here takes a shift along this axis")

    def absorbed(self, statement: Absorbed) -> None:
        for leaf in self.at(statement.place):
            self.sites[leaf].append((statement.node, statement.produces))

    def product(self, statement: Product) -> None:
        if statement.shift == "adds":
            self._sums[statement.result].append(statement)
        elif statement.shift == "stops":
            why = f"{op_name(statement.node.target)} passes no shift"
            places = [p for s in statement.letters for _, p in s.operands]
            places += [s.result for s in statement.letters if s.result]
            for place in places:
                for leaf in self.at(place):
                    self.zero(leaf, statement.node, why)

    def finish(self) -> None:
        """y = a + b: the shift of y is that of a plus that of b, along each axis."""
        for summands in self._sums.values():
            terms: dict[Leaf, list[Term]] = {}
            for summand in summands:
                for letter in summand.letters:
                    for *added, result in self._rows(summand, letter):
                        terms.setdefault(result, []).extend((leaf, 1) for leaf in added)
            for result, summed in terms.items():
                self.constrain(summands[0].node, [*summed, (result, -1)])

    def _rows(self, summand: Product, letter: Letter) -> list[tuple[Leaf, ...]]:
        """For each atom of an axis: its leaf in the operand, if that has it, and in the result."""
        if letter.result is None:
            return []
        columns = [self.at(place) for _, place in letter.operands] + [self.at(letter.result)]
        wanted = [leaf.atom for leaf in columns[-1]]
        if all([leaf.atom for leaf in column] == wanted for column in columns):
            rows = list(zip(*columns, strict=True))
            for leaf in (leaf for row in rows for leaf in row):
                self.run_parallel(leaf, around(leaf))
            return rows
        for leaf in (leaf for column in columns for leaf in column):
            self.zero(leaf, summand.node, "its axes do not align")
        return []


def _space(axes: Axes, system: _Shifts, id: int, root: Leaf, members: list[Term]) -> Space | None:
    real = [(leaf, c) for leaf, c in members if not leaf.value.virtual and fixed_axes(leaf)]
    taken = [(leaf, c) for leaf, c in real if leaf.value.node in axes.edges]
    sites = [(leaf, c) for leaf, c in real if system.sites.get(leaf)]
    if not (taken or sites) or not isinstance(root.atom.size, int):
        return None
    factors = [*_beside(system, members, sites), root.atom]
    turn = _orientation(system, sites)
    params = [
        Member(
            node, turn * (c if produces else -c), flat_index(leaf, factors), leaf.axis, (), produces
        )
        for leaf, c in sites
        for node, produces in system.sites[leaf]
    ]
    params += [
        Member(leaf.value.node, turn * c, flat_index(leaf, factors), leaf.axis) for leaf, c in taken
    ]
    activations = [
        Member(leaf.value.node, turn * c, flat_index(leaf, factors), leaf.axis)
        for leaf, c in real
        if leaf.value.node in axes.program.activations
    ]
    blockers = tuple(system.marks.get(root, {}))
    size = size_of(factors)
    return Space(id, size, tuple(params), tuple(activations), blockers, "shift")


def _orientation(system: _Shifts, sites: list[Term]) -> int:
    """The sign that makes what the first layer reads positive: a residual sum turns it around."""
    read = (c for leaf, c in sites if any(not makes for _, makes in system.sites[leaf]))
    return -1 if next(read, 1) < 0 else 1


def _beside(system: _Shifts, members: list[Term], sites: list[Term]) -> list[Atom]:
    """Dependencies that every bias tells apart too: it has one axis only."""
    return [
        atom
        for atom in system.dependencies(members)
        if all(row_of(leaf, atom)[1] == leaf.axis for leaf, _ in sites)
    ]
