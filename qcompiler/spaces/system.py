"""The unknowns of a channel-space analysis, and what one is: leaves, spaces, and a union-find."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor, fx

from qcompiler.program import node_id, op_name
from qcompiler.spaces.axes import Absorbed, Axes, Letter, Mixed, Place, Product, Same, Value
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
    produces: bool = False
    """The node makes the value: one more operator right behind it would free the space."""


@dataclass(frozen=True, eq=False)
class Member:
    """What a space changes: a parameter, an activation, or an operator's bias (shifts)."""

    node: fx.Node
    exponent: int
    """It is multiplied by scale ** exponent, or by T (+1) or its inverse (-1), or takes exponent ·
    shift."""
    index: Tensor
    """int64. Factors and shifts: broadcastable to the tensor, position in the flat vector,
    `Space.size` where none. Matrices and orders: along `axis`, the channel of the map that stands
    there, -1 where none."""
    axis: int = -1
    which: tuple[tuple[int, Tensor], ...] = ()
    """Matrices: for each of `Space.maps`, (axis, index of the map at each index of that axis)."""
    makes: bool | None = None
    """Shifts: the node is an operator whose bias makes the shifted channels, or (False) reads them
    and takes the shift off; None for parameters and activations."""

    @property
    def name(self) -> str:
        """The parameter that it is or that its edge's expression is about, or the operator."""
        node = self.node
        if self.makes is not None:
            return node_id(node)
        while node.op != "placeholder":
            node = node.all_input_nodes[0]
        return node_id(node)


@dataclass(frozen=True, eq=False)
class Space:
    """One family of maps that cancel out: `size` free positive factors, a square matrix, an order
    of `size` channels, or a vector that is added to them."""

    id: int
    size: int
    params: tuple[Member, ...]
    activations: tuple[Member, ...]
    blocked_by: tuple[Blocker, ...] = ()
    kind: str = "diagonal"
    maps: tuple[int, ...] = ()
    """Matrices: how many may differ, by index (per key/value head, say); one if empty."""

    @property
    def home(self) -> fx.Node:
        """The node whose module path the map's parameter takes."""
        return (*self.params, *self.activations)[0].node

    @property
    def producers(self) -> tuple[Member, ...]:
        """Parameters that take the map."""
        return tuple(m for m in self.params if m.exponent > 0)

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Parameters that take its inverse (transposed)."""
        return tuple(m for m in self.params if m.exponent < 0)


class System(ABC):
    """Unknowns and their union-find with signs, filled from the statements about one kind of map.

    Equal unknowns are joined with sign 1; those of a summed index with -1 (one side takes the map,
    the other its inverse transpose).
    """

    kind: ClassVar[str]

    def __init__(self, axes: Axes) -> None:
        self.leaves: dict[tuple[Value, int], list[Leaf]] = {}
        self._parent: dict[Leaf, tuple[Leaf, int]] = {}
        self.marks: dict[Leaf, dict[Blocker, None]] = defaultdict(dict)
        self.parallel: dict[Leaf, set[Atom]] = {}
        for statement in axes.statements:
            if isinstance(statement, Product):
                self.product(statement)
            elif isinstance(statement, Mixed):
                first, *rest = self.at(statement.place)
                for leaf in rest:
                    if leaf.atom is first.atom:
                        self.join(first, leaf, 1, statement.node)
            elif isinstance(statement, Absorbed):
                self.absorbed(statement)
            elif self.kind in statement.kinds:
                if isinstance(statement, Same):
                    self._same(statement)
                else:
                    for leaf in self.at(statement.place):
                        self.zero(leaf, statement.node, statement.reason)

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

    def product(self, statement: Product) -> None:
        columns = []
        for letter in statement.letters:
            places = [p for _, p in letter.operands] + ([letter.result] if letter.result else [])
            columns.append((letter, [self.at(p) for p in places]))
        for letter, column in columns:
            count = len(letter.operands)
            why = "its axes do not align"
            if letter.fixed:
                why = f"{op_name(statement.node.target)} tells its indices apart"
            if letter.fixed or not _aligned(column):
                for leaves in column:
                    for leaf in leaves:
                        self.zero(leaf, statement.node, why)
                continue
            users = {number for number, _ in letter.operands}
            around = self._companions(columns, letter, users)
            for row in zip(*column, strict=True):
                siblings = {r[i].atom for r in column for i in range(len(r))} - {row[0].atom}
                for leaf in row:
                    self.run_parallel(leaf, around | (siblings & _beside(leaf)))
                operands, results = list(row[:count]), list(row[count:])
                if len(row) == 1:
                    self.alone(row[0], statement.node, summed=not results)
                else:
                    self.equation(statement.node, operands, results)

    def _companions(
        self, columns: Sequence[tuple[Letter, list[list[Leaf]]]], letter: Letter, users: set[int]
    ) -> set[Atom]:
        """Atoms of the other indices that every participant of `letter` has too."""
        found: list[Atom] = []
        wanted = users | ({-1} if letter.result else set())
        for other, column in columns:
            has = {n for n, _ in other.operands} | ({-1} if other.result else set())
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
                self.run_parallel(leaf, around(leaf) & linked[0] & linked[1])
            if [x.atom for x in left] == [y.atom for y in right]:
                for x, y in zip(left, right, strict=True):
                    self.join(x, y, 1, statement.node)
            else:  # the same atoms in another nesting: tie all leaves of an atom, which is safe
                for x in left:
                    for y in right:
                        if x.atom is y.atom:
                            self.join(x, y, 1, statement.node)

    @abstractmethod
    def equation(self, node: fx.Node, operands: list[Leaf], results: list[Leaf]) -> None:
        """What one index of a product demands: `results` is empty where it is summed over."""

    def alone(self, leaf: Leaf, node: fx.Node, summed: bool) -> None:
        """An index that only one participant has: a map would be seen, for most kinds."""
        self.zero(leaf, node, "it is summed over" if summed else "it is repeated along this axis")

    def absorbed(self, statement: Absorbed) -> None:  # noqa: B027 (only shifts care)
        """Where a bias takes a shift."""

    # --- solving -------------------------------------------------------------------------------

    def join(self, a: Leaf, b: Leaf, sign: int, node: fx.Node) -> None:
        """a = sign · b."""
        (root_a, s), (root_b, t) = self.find(a), self.find(b)
        if root_a is root_b:
            if s != sign * t:
                self.clash(root_a, node)
            return
        self._parent[root_b] = (root_a, s * sign * t)
        self.marks[root_a] |= self.marks.pop(root_b, {})
        self._merge_parallel(root_a, root_b)

    def clash(self, leaf: Leaf, node: fx.Node) -> None:
        """A map that is its own inverse transpose: the identity, for most kinds."""
        self.zero(leaf, node, "it would have to be changed and changed back at once")

    def zero(self, leaf: Leaf, node: fx.Node, reason: str) -> None:
        root, _ = self.find(leaf)
        produces = leaf.value.node is node and not leaf.value.virtual
        self.marks[root][Blocker(node_id(node), reason, produces)] = None

    def dependencies(self, members: Iterable[tuple[Leaf, int]]) -> list[Atom]:
        """Atoms of fixed size that a map may depend on: parallel to it wherever it stands."""
        found: set[Atom] | None = None
        for root in {self.find(leaf)[0] for leaf, _ in members}:
            beside = self.parallel.get(root, set())
            found = beside if found is None else found & beside
        return sorted((a for a in found or () if isinstance(a.size, int)), key=_number)

    def run_parallel(self, leaf: Leaf, atoms: set[Atom]) -> None:
        root, _ = self.find(leaf)
        self.parallel[root] = self.parallel.get(root, atoms) & atoms

    def _merge_parallel(self, into: Leaf, gone: Leaf) -> None:
        other = self.parallel.pop(gone, None)
        if other is not None:
            self.parallel[into] = self.parallel.get(into, other) & other


def _aligned(column: list[list[Leaf]]) -> bool:
    """Whether all participants have the same atoms in the same order."""
    first = [leaf.atom for leaf in column[0]]
    return all([leaf.atom for leaf in leaves] == first for leaves in column[1:])


def _beside(leaf: Leaf) -> set[Atom]:
    """Atoms that multiply `leaf` on its own axis (not those of other summands)."""
    return _once(_covering(leaf, leaf.axis)) - {leaf.atom}


def around(leaf: Leaf) -> set[Atom]:
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


def _number(atom: Atom) -> int:
    return atom.number


def _once(found: list[Atom]) -> set[Atom]:
    return {a for a in found if found.count(a) == 1}


def row_of(leaf: Leaf, atom: Atom) -> tuple[np.ndarray, int]:
    """Index of the dependency `atom` along the axis where it stands beside `leaf`."""
    own = digits(leaf.value.axes[leaf.axis])[leaf.number]
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


def orientation(activations: list[tuple[Leaf, int]]) -> int:
    """The sign that makes the last activation (what the consumers read) positive."""
    last = max(activations, key=lambda m: m[0].value.node, default=None)
    return -1 if last is not None and last[1] < 0 else 1
