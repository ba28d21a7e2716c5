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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from qcompiler.program import node_id
from qcompiler.spaces.axes import Axes, Mark, Mixed, Place, Product, Same, Value
from qcompiler.spaces.terms import Atom, atoms, digits, fixed


@dataclass(frozen=True, eq=False)
class Leaf:
    """One atom at one place: an unknown."""

    value: Value
    axis: int
    number: int
    """Position among the atoms of the axis."""
    atom: Atom


@dataclass(frozen=True)
class Blocker:
    """Why a scale cannot pass: at which node, and the reason in words."""

    node: str
    reason: str


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter or an activation that a space scales."""

    node: fx.Node
    exponent: int
    """It is multiplied by scale ** exponent."""
    index: Tensor
    """int64, broadcastable to the tensor: position in the flat scale, `Space.size` where none."""


@dataclass(frozen=True, eq=False)
class Space:
    """One family of diagonal maps: `size` free positive factors that cancel out."""

    id: int
    size: int
    params: tuple[Member, ...]
    activations: tuple[Member, ...]
    blocked_by: tuple[Blocker, ...] = ()

    @property
    def producers(self) -> tuple[Member, ...]:
        """Parameters that are multiplied by the scale."""
        return tuple(m for m in self.params if m.exponent > 0)

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Parameters that are divided by the scale."""
        return tuple(m for m in self.params if m.exponent < 0)


def diagonal_spaces(axes: Axes) -> list[Space]:
    """All diagonal spaces of a program with at least one parameter on either side, in graph order.

    Blocked ones come too, with `blocked_by` filled and nothing to apply.
    """
    system = _System(axes)
    return _Report(axes, system).spaces()


class _System:
    """The unknowns, their union-find with signs, and what is left to eliminate."""

    def __init__(self, axes: Axes) -> None:
        self.leaves: dict[tuple[Value, int], list[Leaf]] = {}
        self._parent: dict[Leaf, tuple[Leaf, int]] = {}
        self.marks: dict[Leaf, dict[Blocker, None]] = defaultdict(dict)
        self.parallel: dict[Leaf, set[Atom]] = {}
        self._long: list[tuple[fx.Node, list[tuple[Leaf, int]]]] = []
        for statement in axes.statements:
            if isinstance(statement, Product):
                self._product(statement)
            elif isinstance(statement, Same):
                self._same(statement)
            elif isinstance(statement, Mark):
                for leaf in self.at(statement.place):
                    self._zero(leaf, statement.node, statement.reason)
            elif isinstance(statement, Mixed):
                first, *rest = self.at(statement.place)
                for leaf in rest:
                    if leaf.atom is first.atom:
                        self._join(first, leaf, 1, statement.node)
        self._eliminate()

    # --- leaves --------------------------------------------------------------------------------

    def at(self, place: Place) -> list[Leaf]:
        """The leaves of an axis, or of the stretch [start, end) of it."""
        key = (place.value, place.axis)
        if key not in self.leaves:
            term = place.value.axes[place.axis]
            self.leaves[key] = [
                Leaf(*key, i, atom) for i, atom in enumerate(atoms(term)) if atom.size != 1
            ]
            for leaf in self.leaves[key]:
                self._parent[leaf] = (leaf, 1)
        if place.start is None or place.end is None:
            return self.leaves[key]
        rows = digits(place.value.axes[place.axis])
        inside = [i for i, row in enumerate(rows) if (row[place.start : place.end] >= 0).any()]
        return [leaf for leaf in self.leaves[key] if leaf.number in inside]

    def find(self, leaf: Leaf) -> tuple[Leaf, int]:
        """(representative, sign): leaf = sign · representative."""
        chain = []
        while self._parent[leaf][0] is not leaf:
            chain.append(leaf)
            leaf = self._parent[leaf][0]
        sign = 1
        for child in reversed(chain):
            sign *= self._parent[child][1]
            self._parent[child] = (leaf, sign)
        return (leaf, sign) if chain else (leaf, 1)

    # --- statements ----------------------------------------------------------------------------

    def _product(self, statement: Product) -> None:
        columns = []
        for letter in statement.letters:
            places = [p for _, p in letter.operands] + ([letter.result] if letter.result else [])
            columns.append((letter, [self.at(p) for p in places]))
        for letter, column in columns:
            count = len(letter.operands)
            if not _aligned(column):
                for leaves in column:
                    for leaf in leaves:
                        self._zero(leaf, statement.node, "its axes do not align")
                continue
            users = {number for number, _ in letter.operands}
            around = self._companions(columns, letter, users)
            for row in zip(*column, strict=True):
                terms = [(leaf, 1) for leaf in row[:count]]
                terms += [(leaf, -1) for leaf in row[count:]]
                siblings = {r[i].atom for r in column for i in range(len(r))} - {row[0].atom}
                for leaf, _ in terms:
                    self._run_parallel(leaf, around | (siblings & _beside(leaf)))
                self._equation(statement.node, terms, letter.result is None)

    def _companions(
        self, columns: Sequence[tuple[object, list[list[Leaf]]]], letter: object, users: set[int]
    ) -> set[Atom]:
        """Atoms of the other indices that every participant of `letter` has too."""
        found: list[Atom] = []
        wanted = users | ({-1} if letter.result else set())  # type: ignore[attr-defined]
        for other, column in columns:
            has = {n for n, _ in other.operands} | ({-1} if other.result else set())  # type: ignore
            if other is not letter and wanted <= has and column:
                found += [leaf.atom for leaf in column[0]]
        return {a for a in found if found.count(a) == 1}

    def _same(self, statement: Same) -> None:
        sides = [
            ([x for p in left for x in self.at(p)], [y for p in right for y in self.at(p)])
            for left, right in statement.pairs
        ]
        linked = [{x.atom for pair in sides for x in pair[side]} for side in (0, 1)]
        for left, right in sides:
            for leaf in (*left, *right):
                self._run_parallel(leaf, _around(leaf) & linked[0] & linked[1])
            if [x.atom for x in left] == [y.atom for y in right]:
                for x, y in zip(left, right, strict=True):
                    self._join(x, y, 1, statement.node)
            else:  # the same atoms in another nesting: tie all leaves of an atom, which is safe
                for x in left:
                    for y in right:
                        if x.atom is y.atom:
                            self._join(x, y, 1, statement.node)

    def _equation(self, node: fx.Node, terms: list[tuple[Leaf, int]], summed: bool) -> None:
        if len(terms) == 1:
            why = "it is summed over" if summed else "it is repeated along this axis"
            self._zero(terms[0][0], node, why)
        elif len(terms) == 2:
            (a, s), (b, t) = terms
            self._join(a, b, -s * t, node)
        else:
            self._long.append((node, terms))

    # --- solving -------------------------------------------------------------------------------

    def _join(self, a: Leaf, b: Leaf, sign: int, node: fx.Node) -> None:
        """a = sign · b."""
        (root_a, s), (root_b, t) = self.find(a), self.find(b)
        if root_a is root_b:
            if s != sign * t:
                self._zero(root_a, node, "it would have to be scaled and unscaled at once")
            return
        self._parent[root_b] = (root_a, s * sign * t)
        self.marks[root_a] |= self.marks.pop(root_b, {})
        self._merge_parallel(root_a, root_b)

    def _zero(self, leaf: Leaf, node: fx.Node, reason: str) -> None:
        root, _ = self.find(leaf)
        self.marks[root][Blocker(node_id(node), reason)] = None

    def _run_parallel(self, leaf: Leaf, atoms: set[Atom]) -> None:
        root, _ = self.find(leaf)
        self.parallel[root] = self.parallel.get(root, atoms) & atoms

    def _merge_parallel(self, into: Leaf, gone: Leaf) -> None:
        other = self.parallel.pop(gone, None)
        if other is not None:
            self.parallel[into] = self.parallel.get(into, other) & other

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
                    self._join(a, b, -1 if s * t > 0 else 1, node)
                elif free:
                    for leaf, _ in free:
                        self._zero(leaf, node, "the other factors of this product are fixed")

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
        is_param = [program.param_of(leaf.value.node) is not None for leaf, _ in real]
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
        turn = _orientation(program.graph, inside)
        params: list[Member] = []
        activations: list[Member] = []
        for leaf, c, p, index in indexed:
            member = Member(leaf.value.node, c * turn, index)
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


def _aligned(column: list[list[Leaf]]) -> bool:
    """Whether all participants have the same atoms in the same order."""
    first = [leaf.atom for leaf in column[0]]
    return all([leaf.atom for leaf in leaves] == first for leaves in column[1:])


def _beside(leaf: Leaf) -> set[Atom]:
    """Atoms that multiply `leaf` on its own axis (not those of other summands)."""
    return _once(_covering(leaf, leaf.axis)) - {leaf.atom}


def _around(leaf: Leaf) -> set[Atom]:
    """Atoms that run in parallel to `leaf` anywhere in its value."""
    found = [a for axis in range(len(leaf.value.axes)) for a in _covering(leaf, axis)]
    return _once(found) - {leaf.atom}


def _covering(leaf: Leaf, axis: int) -> list[Atom]:
    """Atoms on `axis` that have an index wherever `leaf` has one."""
    term = leaf.value.axes[axis]
    if not fixed(term):
        return []
    rows, own = digits(term), leaf.axis == axis
    here = rows[leaf.number] >= 0 if own else slice(None)
    return [a for row, a in zip(rows, atoms(term), strict=True) if (row[here] >= 0).all()]


def _once(found: list[Atom]) -> set[Atom]:
    return {a for a in found if found.count(a) == 1}


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


def _orientation(graph: fx.Graph, activations: list[tuple[Leaf, int]]) -> int:
    """The sign that makes the last activation (what the consumers read) positive."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    last = max(activations, key=lambda m: order[m[0].value.node], default=None)
    return -1 if last is not None and last[1] < 0 else 1


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
