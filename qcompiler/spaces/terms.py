"""Axis terms: which axes of which values hold the same index, in the same order.

Each axis of each value carries a term::

    term ::= atom(n) | prod(term, …) | sum(term, …)

`prod` comes from views that split or merge an axis (major factor first), `sum` from cat, slice and
split. Unification is structural: an atom takes the shape of whatever it meets; products align by
common refinement of their sizes, sums by their cut points; a product distributes over a sum in its
leading factor, (a + b) × D = a × D + b × D. What does not align is a `Conflict`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

import numpy as np
import sympy
import torch

Size: TypeAlias = "int | sympy.Expr"


class Conflict(Exception):
    """Two terms do not describe the same axis."""


class Atom:
    """One index set. `link` points to what it turned out to be (union-find with substitution)."""

    __slots__ = ("link", "number", "size")
    _count = count()

    def __init__(self, size: Size) -> None:
        self.size = size
        self.link: Term | None = None
        self.number = next(self._count)
        """Order of creation, which is that of the graph."""


@dataclass(frozen=True, eq=False)
class Prod:
    parts: tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Sum:
    parts: tuple[Term, ...]


Term = Atom | Prod | Sum


def size_of_dim(n: int | torch.SymInt) -> Size:
    """A fixed size as int, a dynamic one as its sympy expression."""
    if isinstance(n, int):
        return n
    expr = n.node.expr
    return int(expr) if expr.is_Integer else expr


def size(term: Term) -> Size:
    if isinstance(term, Atom):
        return term.size
    sizes = [size(p) for p in term.parts]
    total = sizes[0]
    for s in sizes[1:]:
        total = total * s if isinstance(term, Prod) else total + s
    return total


def fresh(n: int | torch.SymInt) -> Atom:
    return Atom(size_of_dim(n))


def resolve(term: Term) -> Term:
    """Normal form: links followed, products and sums flat, leading sums outside, no ones."""
    if isinstance(term, Atom):
        if term.link is None:
            return term
        term.link = resolve(term.link)  # the next walk is one step: residual streams are long
        return term.link
    parts = [resolve(p) for p in term.parts]
    if isinstance(term, Sum):
        flat = [q for p in parts for q in (p.parts if isinstance(p, Sum) else (p,))]
        return flat[0] if len(flat) == 1 else Sum(tuple(flat))
    flat = [q for p in parts for q in (p.parts if isinstance(p, Prod) else (p,))]
    flat = [p for p in flat if not (isinstance(p, Atom) and p.size == 1)]
    if not flat:
        return Atom(1)
    if len(flat) == 1:
        return flat[0]
    if isinstance(flat[0], Sum):
        return resolve(Sum(tuple(Prod((p, *flat[1:])) for p in flat[0].parts)))
    return Prod(tuple(flat))


def unify(a: Term, b: Term) -> None:
    """Make `a` and `b` the same axis, or raise `Conflict`."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if size(a) != size(b):
        raise Conflict
    if isinstance(a, Atom) or isinstance(b, Atom):
        atom, other = (a, b) if isinstance(a, Atom) else (b, a)
        if any(leaf is atom for leaf in atoms(other)):
            raise Conflict
        atom.link = other  # type: ignore[union-attr]
    elif isinstance(a, Sum) and isinstance(b, Sum):
        _unify_sums(list(a.parts), list(b.parts))
    elif isinstance(a, Prod) and isinstance(b, Prod):
        _unify_products(list(a.parts), list(b.parts))
    else:
        total, product = (a, b) if isinstance(a, Sum) else (b, a)
        at: Size = 0
        for part in total.parts[:-1]:
            at = at + size(part)
            cut(product, at)
        unify(total, product)


def _unify_products(a: list[Term], b: list[Term]) -> None:
    while a and b:
        x, y = resolve(a[0]), resolve(b[0])
        if size(x) == size(y):
            unify(x, y)
            del a[0], b[0]
        elif divides(size(y), size(x)):
            _refine(a, x, size(y))
        elif divides(size(x), size(y)):
            _refine(b, y, size(x))
        else:
            raise Conflict
    if a or b:
        raise Conflict


def _refine(factors: list[Term], large: Term, major: Size) -> None:
    """Split the leading factor `large` into `major` × rest."""
    if isinstance(large, Prod):
        factors[:1] = large.parts
    elif isinstance(large, Atom):
        large.link = Prod((Atom(major), Atom(quotient(large.size, major))))
    else:
        raise Conflict


def _unify_sums(a: list[Term], b: list[Term]) -> None:
    while a and b:
        x, y = resolve(a[0]), resolve(b[0])
        if size(x) == size(y):
            unify(x, y)
            del a[0], b[0]
            continue
        short, long, rest = (x, y, b) if _less(size(x), size(y)) else (y, x, a)
        rest[:1] = cut(long, size(short))
    if a or b:
        raise Conflict


def cut(term: Term, at: Size) -> tuple[Term, Term]:
    """Cut an axis in two at index `at` (0 < at < size); returns both parts, major first."""
    term = resolve(term)
    if isinstance(term, Atom):
        term.link = Sum((Atom(at), Atom(term.size - at)))
        return term.link.parts  # type: ignore[return-value]
    if isinstance(term, Prod):
        inner = size(Prod(term.parts[1:]))
        if not divides(inner, at):
            raise Conflict
        cut(term.parts[0], quotient(at, inner))
        return cut(resolve(term), at)
    left: list[Term] = []
    right = list(term.parts)
    gone: Size = 0
    while right and not _less(at, gone + size(right[0])):
        gone = gone + size(right[0])
        left.append(right.pop(0))
    if gone != at:
        first, second = cut(right[0], at - gone)
        left.append(first)
        right[0] = second
    return resolve(Sum(tuple(left))), resolve(Sum(tuple(right)))


def part(term: Term, start: Size, end: Size) -> Term:
    """The axis restricted to [start, end)."""
    if end != size(term):
        term, _ = cut(term, end)
    if start != 0:
        _, term = cut(term, start)
    return resolve(term)


def divides(small: Size, large: Size) -> bool:
    if isinstance(small, int) and isinstance(large, int):
        return small > 0 and large % small == 0
    return bool(sympy.denom(sympy.cancel(sympy.sympify(large) / small)) == 1)


def quotient(large: Size, small: Size) -> Size:
    if isinstance(small, int) and isinstance(large, int):
        return large // small
    result = sympy.cancel(sympy.sympify(large) / small)
    return int(result) if result.is_Integer else result


def _less(a: Size, b: Size) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    raise Conflict  # the order of symbolic sizes is not known


def atoms(term: Term) -> Iterator[Atom]:
    """The atoms of a term in normal form, in order, repeats included."""
    term = resolve(term)
    if isinstance(term, Atom):
        yield term
    else:
        for p in term.parts:
            yield from atoms(p)


def digits(term: Term) -> list[np.ndarray]:
    """For each atom of a term (in the order of `atoms`): its index at each index of the axis.

    -1 where the atom has no say, in the other summands of a sum. Sizes must be fixed.
    """
    term = resolve(term)
    n = size(term)
    assert isinstance(n, int)
    if isinstance(term, Atom):
        return [np.arange(n)]
    found: list[np.ndarray] = []
    at = 0 if isinstance(term, Sum) else n
    for p in term.parts:
        width = size(p)
        assert isinstance(width, int)
        if isinstance(term, Sum):
            for inner in digits(p):
                whole = np.full(n, -1)
                whole[at : at + width] = inner
                found.append(whole)
            at += width
        else:
            at //= width
            index = (np.arange(n) // at) % width
            found += [inner[index] for inner in digits(p)]
    return found


def fixed(term: Term) -> bool:
    """Whether all sizes in a term are numbers."""
    return all(isinstance(a.size, int) for a in atoms(term))
