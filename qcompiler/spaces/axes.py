"""The axes of every value of a program, and the statements that operators make about them.

`Walk` goes through the graph once. It gives each axis of each value a term, unifies what is the
same axis, and notes what each operator says about maps on its axes: `Product` (scales add up over
the factors), `Same` (a leaf of one value is a leaf of another), `Mark` (here nothing passes),
`Absorbed` (a bias takes what is added). A kind of map (diagonal, orthogonal, …) reads these
statements; it never looks at operators again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import Tensor, fx

from qcompiler.layout import layouts
from qcompiler.program import Program, is_tensor, node_id, shape_of
from qcompiler.spaces.terms import Atom, Conflict, Prod, Term, fresh, size, unify
from qcompiler.spaces.terms import part as restrict


@dataclass(eq=False)
class Value:
    """A node's tensor, or a hidden intermediate value of a fused operator."""

    node: fx.Node
    axes: list[Term]
    virtual: bool = False

    def __repr__(self) -> str:
        return f"<{node_id(self.node)}{' (inside)' if self.virtual else ''}>"


@dataclass(frozen=True, eq=False)
class Place:
    """One axis of one value, or a stretch of it: what a statement talks about."""

    value: Value
    axis: int
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True, eq=False)
class Letter:
    """One index of a product: where it stands in each operand and in the result."""

    operands: tuple[tuple[int, Place], ...]
    """(number of the operand, place)"""
    result: Place | None
    """None when the index is summed over."""
    fixed: bool = False
    """The operator tells the indices apart (rows of a table, taps of a kernel)."""


@dataclass(frozen=True, eq=False)
class Product:
    """result = Σ over summed letters of the product of the operands (one summand of it)."""

    node: fx.Node
    operands: tuple[Value, ...]
    result: Value
    letters: tuple[Letter, ...]
    shift: Literal["stops", "adds", "told"] = "stops"
    """What becomes of x + s: nothing passes, shifts of all summands add up, or see `Absorbed`."""


DIAGONAL = frozenset({"diagonal"})
ORTHOGONAL = frozenset({"orthogonal"})
CENTRING = frozenset({"centring"})
MATRIX = frozenset({"orthogonal", "invertible"}) | CENTRING
PERMUTATION = frozenset({"permutation"})
SHIFT = frozenset({"shift"})
ALL = DIAGONAL | MATRIX | PERMUTATION | SHIFT
"""Kinds of maps on an axis: positive factors per channel, matrices that mix channels (centring is
one matrix, x - mean(x)), another order of the channels, and a vector that is added."""


@dataclass(frozen=True, eq=False)
class Same:
    """Groups of axes that hold the same indices on both sides (views, casts, slices, cat)."""

    node: fx.Node
    pairs: tuple[tuple[tuple[Place, ...], tuple[Place, ...]], ...]
    kinds: frozenset[str] = ALL
    """The kinds of maps that pass from one side to the other."""


@dataclass(frozen=True, eq=False)
class Mark:
    """No map of these kinds passes here."""

    node: fx.Node
    place: Place
    reason: str
    kinds: frozenset[str] = ALL


@dataclass(frozen=True, eq=False)
class Mixed:
    """All leaves of this axis take the same factors (rotary embedding mixes its two halves)."""

    node: fx.Node
    place: Place


@dataclass(frozen=True, eq=False)
class Absorbed:
    """The bias of `node` can take a shift of this axis: of what it makes, or of what it reads."""

    node: fx.Node
    place: Place
    produces: bool


Statement = Product | Same | Mark | Mixed | Absorbed


def mentioned(statement: Statement) -> set[Value]:
    """The values that a statement is about."""
    if isinstance(statement, Product):
        return {*statement.operands, statement.result}
    if isinstance(statement, Same):
        return {p.value for pair in statement.pairs for side in pair for p in side}
    return {statement.place.value}


@dataclass
class Axes:
    """Terms of all values and all statements about them."""

    program: Program
    values: dict[fx.Node, Value] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    """Operators without a rule, and how often they occur."""
    edges: set[fx.Node] = field(default_factory=set)
    """Where a weight comes from: parameters, and the last arithmetic on a weight's edge."""

    @cached_property
    def layouts(self) -> set[fx.Node]:
        """Weights that only lay a parameter out."""
        return layouts(n for n in self.program.graph.nodes if n in self.program.weights)

    # --- values --------------------------------------------------------------------------------

    def of(self, node: object) -> Value | None:
        """The value of a floating point tensor node; None for indices, masks and numbers."""
        if not is_tensor(node):
            return None
        assert isinstance(node, fx.Node)
        value: Tensor = node.meta["val"]
        return self.values.get(node) if value.is_floating_point() else None

    def new(self, node: fx.Node, virtual: bool = False, axes: list[Term] | None = None) -> Value:
        """A value with fresh axes (or `axes`); the node's own unless virtual."""
        terms: list[Term] = axes if axes is not None else [fresh(n) for n in shape_of(node)]
        value = Value(node, terms, virtual)
        if not virtual:
            self.values[node] = value
        return value

    # --- statements ----------------------------------------------------------------------------

    def mark(
        self,
        node: fx.Node,
        value: Value,
        reason: str,
        axes: Sequence[int] | None = None,
        kinds: frozenset[str] = ALL,
    ) -> None:
        """Nothing of `kinds` passes on these axes (all by default) of `value`."""
        for axis in range(len(value.axes)) if axes is None else axes:
            place = Place(value, axis % len(value.axes))
            self.statements.append(Mark(node, place, reason, kinds))

    def same(
        self,
        node: fx.Node,
        pairs: Sequence[tuple[Sequence[Place], Sequence[Place]]],
        kinds: frozenset[str] = ALL,
    ) -> None:
        """Both sides of each pair are the same axes, possibly split differently."""
        kept = []
        for left, right in pairs:
            try:
                unify(_joined(left), _joined(right))
                kept.append((tuple(left), tuple(right)))
            except Conflict:
                for place in (*left, *right):
                    reason = "this view does not keep the channels together"
                    self.statements.append(Mark(node, place, reason))
        self.statements.append(Same(node, tuple(kept), kinds))

    def all_same(self, node: fx.Node, a: Value, b: Value, kinds: frozenset[str] = ALL) -> None:
        """Axis i of `a` is axis i of `b`."""
        self.same(node, [([Place(a, i)], [Place(b, i)]) for i in range(len(a.axes))], kinds)

    def product(
        self,
        node: fx.Node,
        text: str,
        operands: Sequence[Value],
        result: Value,
        shift: Literal["stops", "adds", "told"] = "stops",
    ) -> None:
        """State `result = product(operands)` in the notation of `semantics.py` (no numbers)."""
        left, _, right = text.partition("->")
        terms: dict[str, Term] = {}
        found: dict[str, list[tuple[int, Place]]] = {}
        for number, (axes, value) in enumerate(zip(left.split(","), operands, strict=True)):
            for name, place in self._letters(node, axes, value, terms):
                found.setdefault(name, []).append((number, place))
        out = dict(self._letters(node, right, result, terms))
        letters = tuple(
            Letter(tuple(found.get(name, ())), out.get(name), name.startswith("!"))
            for name in {**found, **out}
        )
        self.statements.append(Product(node, tuple(operands), result, letters, shift))

    def _letters(
        self, node: fx.Node, text: str, value: Value, terms: dict[str, Term]
    ) -> list[tuple[str, Place]]:
        """(letter, place) of each axis of `value`; equal letters are unified, ones are left out."""
        words = text.split()
        if stars := [w for w in words if "*" in w]:
            at = words.index(stars[0])  # leading axes are counted from the right, as in broadcasts
            count = len(value.axes) - (len(words) - 1)
            words[at : at + 1] = [f"{stars[0]}{i - count}" for i in range(count)]
        letters = []
        for axis, name in enumerate(words):
            term = value.axes[axis]
            if size(term) == 1:
                continue
            place = Place(value, axis)
            try:
                unify(terms.setdefault(name, term), term)
                letters.append((name, place))
            except Conflict:
                self.statements.append(Mark(node, place, "its axes do not align"))
        return letters


def _joined(places: Sequence[Place]) -> Term:
    terms = []
    for place in places:
        term = place.value.axes[place.axis]
        if place.start is not None and place.end is not None:
            term = restrict(term, place.start, place.end)
        terms.append(term)
    return terms[0] if len(terms) == 1 else Prod(tuple(terms)) if terms else Atom(1)
