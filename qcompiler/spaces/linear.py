"""Unknowns that add up: what diagonal maps (log-scales) and shifts have in common.

Equations of two unknowns are a union-find with signs; those of more are eliminated until nothing
changes. What stays free spans the solutions: every unknown is an expression over the free ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, fx

from qcompiler.spaces.axes import Axes
from qcompiler.spaces.system import Leaf, System, row_of
from qcompiler.spaces.terms import Atom, digits, fixed

Term = tuple[Leaf, int]


class LinearSystem(System):
    """Σ coefficient · unknown = 0, the same for every index of the atom."""

    def __init__(self, axes: Axes) -> None:
        self._long: list[tuple[fx.Node, list[Term]]] = []
        super().__init__(axes)
        self.finish()
        self._eliminate()
        self._patterns = self._solve_open()

    def finish(self) -> None:
        """State what needs all statements to have been read."""

    def constrain(self, node: fx.Node, terms: list[Term]) -> None:
        """Σ coefficient · unknown = 0; the coefficients are ±1."""
        if len(terms) == 1:
            self.alone(terms[0][0], node, summed=False)
        elif len(terms) == 2:
            (a, s), (b, t) = terms
            self.join(a, b, -s * t, node)
        else:
            self._long.append((node, terms))

    def solutions(self) -> dict[Leaf, list[Term]]:
        """Free unknown → every unknown that it is part of, with its coefficient."""
        groups: dict[Leaf, list[Term]] = defaultdict(list)
        for leaves in self.leaves.values():
            for leaf in leaves:
                root, sign = self.find(leaf)
                for free, c in self._patterns.get(root, {root: 1}).items():
                    groups[free].append((leaf, sign * c))
        return groups

    def _eliminate(self) -> None:
        """Drop zero unknowns from long equations until all that remain are free."""
        changed = True
        while changed:
            changed = False
            for entry in list(self._long):
                node, terms = entry
                left: dict[Leaf, int] = defaultdict(int)
                for leaf, s in terms:
                    root, t = self.find(leaf)
                    if not self.marks.get(root):
                        left[root] += s * t
                free = [(leaf, c) for leaf, c in left.items() if c]
                if len(free) > 2:
                    continue
                self._long.remove(entry)
                changed = True
                if len(free) == 2 and abs(free[0][1]) == abs(free[1][1]):
                    (a, s), (b, t) = free
                    self.join(a, b, -1 if s * t > 0 else 1, node)
                elif free:
                    for leaf, _ in free:
                        self.zero(leaf, node, "all else that meets it here is fixed")

    def _solve_open(self) -> dict[Leaf, dict[Leaf, int]]:
        """Representative → its expression over free unknowns (Gaussian elimination, exact)."""
        pattern: dict[Leaf, dict[Leaf, int]] = {}
        for _, terms in self._long:
            total: dict[Leaf, int] = defaultdict(int)
            for leaf, s in terms:
                root, t = self.find(leaf)
                for free, d in pattern.get(root, {root: 1}).items():
                    total[free] += s * t * d
            total = {leaf: c for leaf, c in total.items() if c}
            pivot = next((leaf for leaf in reversed(total) if abs(total[leaf]) == 1), None)
            if pivot is None:
                continue
            solved = {x: -c * total[pivot] for x, c in total.items() if x is not pivot}
            for key, expression in list(pattern.items()):
                if (c := expression.pop(pivot, 0)) != 0:
                    for x, d in solved.items():
                        expression[x] = expression.get(x, 0) + c * d
                    pattern[key] = {x: d for x, d in expression.items() if d}
            pattern[pivot] = solved
        return pattern


def fixed_axes(leaf: Leaf) -> bool:
    """Whether the leaf's axis has a size known now."""
    return fixed(leaf.value.axes[leaf.axis])


def flat_index(leaf: Leaf, factors: Sequence[Atom]) -> Tensor:
    """Flat position in the vector of each index of the tensor; the vector's size for none.

    `factors` are the leaf's own atom and those that its value may depend on, major first.
    """
    total = size_of(factors)
    rank = len(leaf.value.axes)
    own = digits(leaf.value.axes[leaf.axis])[leaf.number]
    flat: np.ndarray = np.zeros((1,) * rank, dtype=np.int64)
    valid: np.ndarray = np.ones((1,) * rank, dtype=bool)
    for atom in factors:
        row, axis = (own, leaf.axis) if atom is leaf.atom else row_of(leaf, atom)
        row = row.reshape([-1 if i == axis else 1 for i in range(rank)])
        flat = flat * int(atom.size) + np.maximum(row, 0)
        valid = valid & (row >= 0)
    return torch.from_numpy(np.where(valid, flat, total))


def size_of(factors: Sequence[Atom]) -> int:
    """Length of a vector over these atoms."""
    return int(np.prod([int(a.size) for a in factors]))
