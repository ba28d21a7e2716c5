"""Diagonal maps: which channels may be scaled, by the same factors, without changing the program.

The unknowns are log-scales, one per *leaf* (an atom on an axis of a value). Statements about axes
are linear equations between them, the same for every index of the atom::

    y = x                    views, ReLU, a linear's output and its weight's rows
    x + w = 0                a summed index: one side takes t, the other 1/t
    y = a + b                an elementwise product
    x = 0                    a mark: nothing passes here

Each unknown that stays free is one `Space`: a pattern of exponents over parameters and activations.
Its scale may differ per index of another atom (per key/value head, say) when that atom runs in
parallel to it in every equation: these are its dependencies.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import ClassVar

from torch import fx

from qcompiler.spaces.axes import Axes
from qcompiler.spaces.linear import LinearSystem, Term, fixed_axes, flat_index, size_of
from qcompiler.spaces.system import Leaf, Member, Space, orientation


def diagonal_spaces(axes: Axes) -> list[Space]:
    """All diagonal spaces of a program with at least one parameter on either side, in graph order.

    Blocked ones come too, with `blocked_by` filled and nothing to apply.
    """
    system = _LogScales(axes)
    found: list[Space] = []
    for root, members in system.solutions().items():
        space = _space(axes, system, len(found), root, members)
        if space is not None:
            found.append(space)
    return _largest(found)


class _LogScales(LinearSystem):
    kind: ClassVar[str] = "diagonal"

    def equation(self, node: fx.Node, operands: list[Leaf], results: list[Leaf]) -> None:
        """The factors of the operands multiply to the result's, or to 1 where they are summed."""
        self.constrain(node, [(leaf, 1) for leaf in operands] + [(leaf, -1) for leaf in results])


def _space(
    axes: Axes, system: LinearSystem, id: int, root: Leaf, members: list[Term]
) -> Space | None:
    real = [(leaf, c) for leaf, c in members if not leaf.value.virtual]
    active = axes.program.activations
    if not any(leaf.value.node in axes.edges for leaf, _ in real):
        return None
    if not isinstance(root.atom.size, int):
        return None
    # Factors of the scale: the atom itself, and those that it may depend on.
    factors = [*system.dependencies(members), root.atom]
    known = [(leaf, c) for leaf, c in real if fixed_axes(leaf)]
    turn = orientation([m for m in known if m[0].value.node in active])
    listed = [
        Member(leaf.value.node, c * turn, flat_index(leaf, factors), leaf.axis) for leaf, c in known
    ]
    return Space(
        id,
        size_of(factors),
        tuple(m for m in listed if m.node in axes.edges),
        tuple(m for m in listed if m.node in active),
        tuple(system.marks.get(root, {})),
    )


def _largest(spaces: list[Space]) -> list[Space]:
    """Leave out a space that another contains: a scale per head, beside one per channel."""
    members = [{(m.node, m.exponent) for m in space.params} for space in spaces]
    having: dict[tuple[fx.Node, int], list[int]] = defaultdict(list)
    for number, space in enumerate(spaces):
        for member in members[number] if not space.blocked_by else ():
            having[member].append(number)

    def contained(number: int) -> bool:
        size = spaces[number].size
        return any(
            spaces[other].size > size
            and spaces[other].size % size == 0
            and members[number] <= members[other]
            for other in having[next(iter(members[number]))]
        )

    kept = [s for i, s in enumerate(spaces) if s.blocked_by or not contained(i)]
    return [replace(s, id=i) for i, s in enumerate(kept)]
