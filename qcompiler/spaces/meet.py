"""Spaces without weights: two computed values that meet in a product (queries and keys).

One operator behind each of the nodes that make them maps them: R3 of SpinQuant (Liu et al. 2024).
Rotary embeddings leave the two halves of an axis as separate index sets that are mapped alike;
where the axis is passed on whole by every operator, a map may mix the halves too.
"""

from __future__ import annotations

import torch

from qcompiler.spaces.axes import Axes, Place, Product, Same, Value
from qcompiler.spaces.system import Blocker, Leaf, Member, Space
from qcompiler.spaces.terms import fixed, size

Signed = tuple[Leaf, int]


class Meetings:
    """Finds such spaces; reads the statements once for all of them."""

    def __init__(self, axes: Axes, kind: str) -> None:
        self._axes = axes
        self._kind = kind
        self._tied: dict[tuple[Value, int], list[list[Place]]] = {}
        """Axis → the places that each statement ties it to, itself included."""
        for statement in axes.statements:
            groups: list[list[Place]] = []
            if isinstance(statement, Same) and kind in statement.kinds:
                groups = [[*left, *right] for left, right in statement.pairs]
            elif isinstance(statement, Product):
                for letter in statement.letters:
                    groups.append([p for _, p in letter.operands])
                    groups[-1] += [letter.result] if letter.result else []
            for group in groups:
                for place in group:
                    self._tied.setdefault((place.value, place.axis), []).append(group)

    def space(self, id: int, members: list[Signed], blockers: tuple[Blocker, ...]) -> Space | None:
        """The space of a class of leaves without a parameter, or None if no two values meet."""
        if len({sign for _, sign in members}) != 2 or not blockers:
            return None
        if not all(b.produces for b in blockers) or not self._whole(members):
            return None
        signs = {(leaf.value, leaf.axis): sign for leaf, sign in members}
        inside = []
        for (value, axis), sign in signs.items():
            if value.virtual or value.node not in self._axes.program.activations:
                continue
            width = size(value.axes[axis])
            assert isinstance(width, int)
            inside.append(Member(value.node, sign, torch.arange(width), axis))
        widths = {len(m.index) for m in inside}
        if len(widths) != 1:
            return None
        return Space(id, widths.pop(), (), tuple(inside), blockers, self._kind)

    def _whole(self, members: list[Signed]) -> bool:
        """Whether every statement about these axes passes them on whole and in order."""
        own: dict[tuple[Value, int], int] = {}
        for leaf, _ in members:
            if not fixed(leaf.value.axes[leaf.axis]):
                return False
            key = (leaf.value, leaf.axis)
            own[key] = own.get(key, 0) + int(leaf.atom.size)
        for key, covered in own.items():
            if covered != size(key[0].axes[key[1]]):
                return False
            for group in self._tied.get(key, ()):
                if any(p.start is not None or (p.value, p.axis) not in own for p in group):
                    return False
        return True
