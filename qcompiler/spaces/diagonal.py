"""Diagonal maps: which channels may be scaled, by the same factors, without changing the program.

The unknowns are log-scales, one per *leaf* (an atom on an axis of a value). Statements about axes
are linear equations between them, the same for every index of the atom::

    y = x                    views, ReLU, a linear's output and its weight's rows
    x + w = 0                a summed index: one side takes t, the other 1/t
    y = a + b                an elementwise product
    x = 0                    a mark: nothing passes here

Equations of two unknowns are a union-find with signs; those of more are eliminated until nothing
changes. Each unknown that stays free is one `Space`: a pattern of exponents over parameters and
activations. Its scale may differ per index of another atom (per key/value head, say) when that atom
runs in parallel to it in every equation: these are its dependencies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from qcompiler.spaces.axes import Axes
from qcompiler.spaces.system import Leaf, Member, Space, System, orientation
from qcompiler.spaces.terms import Atom, atoms, digits, fixed


def diagonal_spaces(axes: Axes) -> list[Space]:
    """All diagonal spaces of a program with at least one parameter on either side, in graph order.

    Blocked ones come too, with `blocked_by` filled and nothing to apply.
    """
    system = _System(axes)
    return _Report(axes, system).spaces()


class _System(System):
    """Log-scales, and what is left to eliminate."""

    kind: ClassVar[str] = "diagonal"

    def __init__(self, axes: Axes) -> None:
        self._long: list[tuple[fx.Node, list[tuple[Leaf, int]]]] = []
        super().__init__(axes)
        self._eliminate()

    def equation(self, node: fx.Node, operands: list[Leaf], results: list[Leaf]) -> None:
        """The factors of the operands multiply to the result's, or to 1 where they are summed."""
        terms = [(leaf, 1) for leaf in operands] + [(leaf, -1) for leaf in results]
        if len(terms) == 2:
            (a, s), (b, t) = terms
            self.join(a, b, -s * t, node)
        else:
            self._long.append((node, terms))

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
                        self.zero(leaf, node, "the other factors of this product are fixed")

    @property
    def open(self) -> list[list[tuple[Leaf, int]]]:
        """Equations over three or more free unknowns, by representatives."""
        result = []
        for _, terms in self._long:
            total: dict[Leaf, int] = defaultdict(int)
            for leaf, s in terms:
                root, t = self.find(leaf)
                total[root] += s * t
            result.append([(leaf, c) for leaf, c in total.items() if c])
        return result


class _Report:
    """From the solved system to spaces."""

    def __init__(self, axes: Axes, system: _System) -> None:
        self._axes = axes
        self._system = system
        self._patterns = self._solve_open()

    def _solve_open(self) -> dict[Leaf, dict[Leaf, int]]:
        """Representative → its expression over free unknowns (Gaussian elimination, exact)."""
        pattern: dict[Leaf, dict[Leaf, int]] = {}
        for equation in self._system.open:
            total: dict[Leaf, int] = defaultdict(int)
            for leaf, c in equation:
                for free, d in pattern.get(leaf, {leaf: 1}).items():
                    total[free] += c * d
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

    def spaces(self) -> list[Space]:
        groups: dict[Leaf, list[tuple[Leaf, int]]] = defaultdict(list)
        for leaves in self._system.leaves.values():
            for leaf in leaves:
                root, sign = self._system.find(leaf)
                for free, c in self._patterns.get(root, {root: 1}).items():
                    groups[free].append((leaf, sign * c))
        found: list[Space] = []
        for root, members in groups.items():
            space = self._space(len(found), root, members)
            if space is not None:
                found.append(space)
        return _largest(found)

    def _space(self, id: int, root: Leaf, members: list[tuple[Leaf, int]]) -> Space | None:
        real = [(leaf, c) for leaf, c in members if not leaf.value.virtual]
        program = self._axes.program
        is_param = [leaf.value.node in self._axes.edges for leaf, _ in real]
        if not any(is_param) or not isinstance(root.atom.size, int):
            return None
        # Factors of the scale: the atom itself, and those that it may depend on.
        parallel = self._dependencies(members)
        factors = [a for a in sorted(parallel, key=id_of) if isinstance(a.size, int)] + [root.atom]
        indexed = [
            (leaf, c, p, _index(leaf, factors))
            for (leaf, c), p in zip(real, is_param, strict=True)
            if _fixed_axes(leaf)
        ]
        size = int(np.prod([int(a.size) for a in factors]))
        blockers = tuple(self._system.marks.get(root, {}))
        inside = [(e[0], e[1]) for e in indexed if e[0].value.node in program.activations]
        turn = orientation(program.graph, inside)
        params: list[Member] = []
        activations: list[Member] = []
        for leaf, c, p, index in indexed:
            member = Member(leaf.value.node, c * turn, index, leaf.axis)
            if p:
                params.append(member)
            elif member.node in program.activations:
                activations.append(member)
        return Space(id, size, tuple(params), tuple(activations), blockers)

    def _dependencies(self, members: Iterable[tuple[Leaf, int]]) -> set[Atom]:
        found: set[Atom] | None = None
        for root in {self._system.find(leaf)[0] for leaf, _ in members}:
            atoms = self._system.parallel.get(root, set())
            found = atoms if found is None else found & atoms
        return found or set()


def id_of(atom: Atom) -> int:
    return id(atom)


def _fixed_axes(leaf: Leaf) -> bool:
    return fixed(leaf.value.axes[leaf.axis])


def _index(leaf: Leaf, factors: list[Atom]) -> Tensor:
    """Flat position in the scale of each index of the tensor; the scale's size for none."""
    total = int(np.prod([int(a.size) for a in factors]))
    rank = len(leaf.value.axes)
    own = digits(leaf.value.axes[leaf.axis])[leaf.number]
    flat: np.ndarray = np.zeros((1,) * rank, dtype=np.int64)
    valid: np.ndarray = np.ones((1,) * rank, dtype=bool)
    for atom in factors:
        row, axis = (own, leaf.axis) if atom is leaf.atom else _row_of(leaf, atom, own)
        row = row.reshape([-1 if i == axis else 1 for i in range(rank)])
        flat = flat * int(atom.size) + np.maximum(row, 0)
        valid = valid & (row >= 0)
    return torch.from_numpy(np.where(valid, flat, total))


def _row_of(leaf: Leaf, atom: Atom, own: np.ndarray) -> tuple[np.ndarray, int]:
    """Index of the dependency `atom` along the axis where it stands beside `leaf`."""
    order = [leaf.axis, *[i for i in range(len(leaf.value.axes)) if i != leaf.axis]]
    for axis in order:
        term = leaf.value.axes[axis]
        if not fixed(term):
            continue
        for row, name in zip(digits(term), atoms(term), strict=True):
            covers = (row[own >= 0] >= 0).all() if axis == leaf.axis else (row >= 0).all()
            if name is atom and covers:
                return row, axis
    raise AssertionError("a dependency stands beside its leaf in every value")


def _largest(spaces: list[Space]) -> list[Space]:
    """Leave out a space that another contains: a scale per head, beside one per channel."""
    kept = []
    for space in spaces:
        mine = {(m.node, m.exponent) for m in space.params}
        contained = any(
            other is not space
            and other.size > space.size
            and not other.blocked_by
            and mine <= {(m.node, m.exponent) for m in other.params}
            and other.size % space.size == 0
            for other in spaces
        )
        if not contained or space.blocked_by:
            kept.append(space)
    return [Space(i, s.size, s.params, s.activations, s.blocked_by) for i, s in enumerate(kept)]
