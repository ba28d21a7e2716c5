"""Matrix maps: which channels may be mixed with each other without changing the program.

The unknown of a leaf is a matrix T on its atom: a value v there becomes T v. Statements say::

    y = x W          x and W share a summed index: one takes T, the other its inverse transpose
    y[n] = x[n] …    a free index: the result takes the operand's T
    y[n] = x[n] g[n] an elementwise product: the identity only
    T x = 0          a mark: the identity only

`orthogonal` maps are their own inverse transpose and pass RMSNorm's core (‖T x‖ = ‖x‖), which is
what rotations are made of (Ashkboos et al. 2024, section 3); `invertible` ones do neither. One T
serves all indices of the other axes, of all heads, say. `centring` is a single map, x - mean(x),
which LayerNorm's core absorbs: its space is a stream that nobody else reads.
"""

from __future__ import annotations

from collections import defaultdict
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from qcompiler.program import op_name
from qcompiler.spaces.axes import Axes
from qcompiler.spaces.meet import Meetings
from qcompiler.spaces.system import (
    Leaf,
    Member,
    Space,
    System,
    orientation,
    row_of,
)
from qcompiler.spaces.terms import Atom, digits, fixed

DEPENDENT = ("orthogonal", "invertible")
"""Kinds whose map may differ by index (per key/value head)."""


class _Invertible(System):
    """Any invertible matrix."""

    kind: ClassVar[str] = "invertible"

    def equation(self, node: fx.Node, operands: list[Leaf], results: list[Leaf]) -> None:
        """One free operand passes its map on; two summed ones take inverse maps."""
        if len(operands) == 1:
            self.join(operands[0], results[0], 1, node)
        elif len(operands) == 2 and not results:
            self.join(operands[0], operands[1], -1, node)
        else:
            for leaf in (*operands, *results):
                self.zero(leaf, node, "it is multiplied channel by channel")


class _Orthogonal(_Invertible):
    """Rotations and reflections."""

    kind: ClassVar[str] = "orthogonal"

    def clash(self, leaf: Leaf, node: fx.Node) -> None:
        """An orthogonal map is its own inverse transpose."""


class _Centring(_Orthogonal):
    """x - mean(x): LayerNorm's core does not see the difference, a product would."""

    kind: ClassVar[str] = "centring"

    def equation(self, node: fx.Node, operands: list[Leaf], results: list[Leaf]) -> None:
        """A sum over the axis sees the mean, and so does a product along it."""
        if len(operands) == 1:
            self.join(operands[0], results[0], 1, node)
        else:
            for leaf in (*operands, *results):
                self.zero(leaf, node, f"{op_name(node.target)} reads it with its mean")


class _Permutation(_Orthogonal):
    """Another order of the channels: what treats all of them alike does not see it."""

    kind: ClassVar[str] = "permutation"

    def equation(self, node: fx.Node, operands: list[Leaf], results: list[Leaf]) -> None:
        """All that share the index share its order; the sign tells readers from producers."""
        first, *rest = (*operands, *results)
        summed = not results and len(operands) == 2
        for leaf in rest:
            self.join(first, leaf, -1 if summed else 1, node)

    def alone(self, leaf: Leaf, node: fx.Node, summed: bool) -> None:
        """A sum over an index, or copies along it, are the same in any order."""


SYSTEMS: dict[str, type[System]] = {
    s.kind: s for s in (_Orthogonal, _Invertible, _Centring, _Permutation)
}


def matrix_spaces(axes: Axes, kind: str) -> list[Space]:
    """All spaces of matrix maps with a parameter in them, in graph order, blocked ones included."""
    system = SYSTEMS[kind](axes)
    meetings = Meetings(axes, kind)
    program = axes.program
    groups: dict[Leaf, list[tuple[Leaf, int]]] = defaultdict(list)
    for leaves in system.leaves.values():
        for leaf in leaves:
            root, sign = system.find(leaf)
            groups[root].append((leaf, sign))
    found: list[Space] = []
    for root, members in groups.items():
        real = [(leaf, sign) for leaf, sign in members if not leaf.value.virtual]
        active = [m for m in real if m[0].value.node in program.activations]
        params = [m for m in real if m[0].value.node in axes.edges]
        size = root.atom.size
        known = all(fixed(leaf.value.axes[leaf.axis]) for leaf, _ in (*active, *params))
        blockers = tuple(system.marks.get(root, {}))
        if not params and kind in DEPENDENT:
            space = meetings.space(len(found), members, blockers)
            found += [space] if space is not None else []
        if not params or not isinstance(size, int) or not known:
            continue
        turn = orientation(active)
        depends = _dependencies(system, members, params) if kind in DEPENDENT else []
        outside = tuple(
            Member(
                leaf.value.node,
                sign * turn,
                _channels(leaf),
                leaf.axis,
                tuple((axis, torch.from_numpy(row)) for row, axis in _rows(leaf, depends)),
            )
            for leaf, sign in params
        )
        inside = tuple(
            Member(leaf.value.node, sign * turn, _channels(leaf), leaf.axis)
            for leaf, sign in active
        )
        maps = tuple(int(a.size) for a in depends)
        found.append(Space(len(found), size, outside, inside, blockers, kind, maps))
    return found


def _dependencies(
    system: System, members: list[tuple[Leaf, int]], params: list[tuple[Leaf, int]]
) -> list[Atom]:
    """What the matrix may differ by: each parameter must be laid out by it."""
    if len(params) < 2:
        return []
    found = system.dependencies(members)
    return [a for a in found if all(_tells(leaf, a) for leaf, _ in params)]


def _rows(leaf: Leaf, depends: list[Atom]) -> list[tuple[np.ndarray, int]]:
    return [row_of(leaf, atom) for atom in depends]


def _tells(leaf: Leaf, atom: Atom) -> bool:
    """Whether the leaf's tensor is laid out by `atom`: on its own axis, or on a whole other one."""
    row, axis = row_of(leaf, atom)
    return axis == leaf.axis or len(row) == atom.size


def _channels(leaf: Leaf) -> torch.Tensor:
    """For each index along the leaf's axis the channel of the map that it is, or -1."""
    return torch.from_numpy(digits(leaf.value.axes[leaf.axis])[leaf.number])
