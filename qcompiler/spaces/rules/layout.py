"""Rules of operators that lay values out: views, slices, gathers, pads."""

from __future__ import annotations

import torch
from torch import fx

from qcompiler.program import op_name, shape_of
from qcompiler.spaces.axes import ALL, PERMUTATION, SHIFT, Axes, Place, Value
from qcompiler.spaces.rules.common import input_of, try_unify, unknown
from qcompiler.spaces.terms import Prod, Sum, divides, size

aten = torch.ops.aten


def reshape(axes: Axes, node: fx.Node) -> None:
    """Align both shapes from the left: each group of axes with equal products is one index set."""
    x = input_of(axes, node)
    result = axes.new(node)
    if x is None:
        return axes.mark(node, result, "it is made from integers")
    left, right = list(range(len(x.axes))), list(range(len(result.axes)))
    pairs = []
    while left or right:
        a, b = [left.pop(0)] if left else [], [right.pop(0)] if right else []
        while (m := _total(x, a)) != (n := _total(result, b)):
            grow_a = left and (not right or _smaller(m, n))
            if not left and not right:
                axes.mark(node, x, "this view has no fixed grouping of axes")
                return axes.mark(node, result, "this view has no fixed grouping of axes")
            (a if grow_a else b).append((left if grow_a else right).pop(0))
        pairs.append(([Place(x, i) for i in a], [Place(result, i) for i in b]))
    return axes.same(node, pairs)


def _total(value: Value, axes: list[int]) -> object:
    return size(Prod(tuple(value.axes[i] for i in axes))) if axes else 1


def _smaller(m: object, n: object) -> bool:
    """Which side must grow. Of symbolic sizes, one that the other contains is the smaller."""
    if isinstance(m, int) and isinstance(n, int):
        return m < n
    return divides(m, n)  # type: ignore[arg-type]


def permute(axes: Axes, node: fx.Node) -> None:
    x = input_of(axes, node)
    result = axes.new(node)
    if x is None:
        return axes.mark(node, result, "it is made from integers")
    rank = len(x.axes)
    if node.target is aten.permute.default:
        order = [d % rank for d in node.args[1]]  # type: ignore[union-attr,operator]
    else:
        order = list(range(rank))
        if rank > 1:
            a, b = (0, 1) if node.target is aten.t.default else node.args[1:3]
            order[a], order[b] = order[b], order[a]  # type: ignore[index]
    pairs = [([Place(x, source)], [Place(result, i)]) for i, source in enumerate(order)]
    return axes.same(node, pairs)


def slice(axes: Axes, node: fx.Node) -> None:
    x = input_of(axes, node)
    _, axis, start, _end, step = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    result = axes.new(node)
    if x is None:
        return axes.mark(node, result, "it is made from integers")
    axis %= len(x.axes)  # type: ignore[operator]
    width, length = shape_of(node.args[0])[axis], shape_of(node)[axis]  # type: ignore[arg-type,index]
    if length == 0:
        return None
    pairs = [([Place(x, i)], [Place(result, i)]) for i in range(len(x.axes)) if i != axis]
    if step == 1 and isinstance(width, int) and isinstance(length, int):
        first = max(start + width if (start or 0) < 0 else start or 0, 0)  # type: ignore
        pairs.append(([Place(x, axis, first, first + length)], [Place(result, axis)]))  # type: ignore
    else:
        for value in (x, result):
            axes.mark(node, value, "a slice of unknown extent or with a step", [axis])  # type: ignore
    return axes.same(node, pairs)


def select(axes: Axes, node: fx.Node) -> None:
    x = input_of(axes, node)
    result = axes.new(node)
    if x is None:
        return axes.mark(node, result, "it is made from integers")
    axis = node.args[1] % len(x.axes)  # type: ignore[operator]
    kept = [i for i in range(len(x.axes)) if i != axis]
    axes.mark(node, x, "one index of it is selected", [axis])
    return axes.same(node, [([Place(x, i)], [Place(result, j)]) for j, i in enumerate(kept)])


def cat(axes: Axes, node: fx.Node) -> None:
    result = axes.new(node)
    axis = (node.args[1] if len(node.args) > 1 else 0) % len(result.axes)  # type: ignore
    inputs = [n for n in node.args[0] if shape_of(n)[axis] != 0]  # type: ignore
    parts, widths = [axes.of(n) for n in inputs], [shape_of(n)[axis] for n in inputs]
    if any(p is None for p in parts) or not all(isinstance(w, int) for w in widths):
        for value in filter(None, [*parts, result]):
            axes.mark(node, value, "a cat of unknown sizes")
        return
    values = [p for p in parts if p is not None]
    try_unify(result.axes[axis], Sum(tuple(p.axes[axis] for p in values)))
    at = 0
    for value, width in zip(values, widths, strict=True):
        pairs = [
            ([Place(value, i)], [Place(result, i)]) for i in range(len(value.axes)) if i != axis
        ]
        pairs.append(([Place(value, axis)], [Place(result, axis, at, at + width)]))  # type: ignore
        axes.same(node, pairs)
        at += width  # type: ignore[operator]


def expand(axes: Axes, node: fx.Node) -> None:
    """An axis that is repeated is constant along its copies."""
    x = input_of(axes, node)
    result = axes.new(node)
    if x is None:
        return axes.mark(node, result, "it is made from integers")
    axes.product(node, "* -> *", [x], result, "adds")
    return None


def repeat(axes: Axes, node: fx.Node) -> None:
    """Copies behind one another. Along an axis of one index this is what `expand` does."""
    x = input_of(axes, node)
    if x is None:
        return unknown(axes, node)
    result, counts = axes.new(node), list(node.args[1])
    first = len(counts) - len(x.axes)
    for axis, count in enumerate(counts[first:]):
        if size(x.axes[axis]) == 1:
            continue
        if count == 1:
            axes.same(node, [([Place(x, axis)], [Place(result, first + axis)])])
        else:
            axes.mark(node, x, "it is repeated along this axis", [axis])
            axes.mark(node, result, "it is repeated along this axis", [first + axis])
    fresh_axes = [i for i, n in enumerate(counts) if i < first or size(x.axes[i - first]) == 1]
    axes.mark(node, result, "it is repeated along this axis", fresh_axes, ALL - PERMUTATION)
    return None


def moved(axes: Axes, node: fx.Node) -> None:
    """roll and flip: indices move along some axes, all others are the same."""
    x = input_of(axes, node)
    dims = node.args[2 if node.target is aten.roll.default else 1 :][:1]
    if x is None or not dims or not dims[0]:
        return unknown(axes, node)
    result, rank = axes.new(node), len(x.axes)
    gone = {d % rank for d in dims[0]}
    for axis in range(rank):
        if axis not in gone:
            axes.same(node, [([Place(x, axis)], [Place(result, axis)])])
    for value in (x, result):
        axes.mark(node, value, f"{op_name(node.target)} moves its indices", sorted(gone))
    return None


def rows(axes: Axes, node: fx.Node) -> None:
    """A gather along one axis: tables of experts by expert, rows in another order, copies."""
    x = input_of(axes, node)
    axis, count = _gathered(node)
    if x is None or axis is None:
        return unknown(axes, node)
    result = axes.new(node)
    names = [f"a{i}" for i in range(len(x.axes))]
    names[axis] = f"!a{axis}"
    out = [*names[:axis], *(f"!r{i}" for i in range(count)), *names[axis + 1 :]]
    axes.product(node, f"{' '.join(names)} -> {' '.join(out)}", [x], result)
    return None


def _gathered(node: fx.Node) -> tuple[int | None, int]:
    """(axis of the input that rows are taken from, axes that stand there afterwards)."""
    rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    if node.target is aten.repeat_interleave.self_int:
        axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        return (axis % rank, 1) if isinstance(axis, int) else (None, 0)
    if node.target is aten.index_select.default:
        return node.args[1] % rank, 1  # type: ignore[operator,return-value]
    given = [(i, n) for i, n in enumerate(node.args[1]) if n is not None]  # type: ignore
    if len(given) != 1 or given[0][1].meta["val"].dtype is torch.bool:  # type: ignore[union-attr]
        return None, 0
    return given[0][0], len(shape_of(given[0][1]))  # type: ignore[arg-type]


def pad(axes: Axes, node: fx.Node) -> None:
    """Zeros around some axes: the others are the same."""
    x = input_of(axes, node)
    pads, mode, fill = (*node.args[1:], *("constant", None)[len(node.args) - 2 :])[:3]
    if x is None or mode != "constant" or fill or not isinstance(pads, list | tuple):
        return unknown(axes, node)
    result = axes.new(node)
    rank, wide = len(x.axes), len(pads) // 2
    for i in range(rank):
        at = 2 * (rank - 1 - i)
        if i >= rank - wide and (pads[at] != 0 or pads[at + 1] != 0):
            for value in (x, result):
                axes.mark(node, value, "it is padded along this axis", [i])
        else:
            axes.same(node, [([Place(x, i)], [Place(result, i)])], ALL - SHIFT)
    for value in (x, result):
        axes.mark(node, value, "zeros are put around it", kinds=SHIFT)
    return None
