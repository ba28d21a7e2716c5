"""Selections from a fused projection become slices of it.

    x.view(…, f, n)[…, i, :]  =  x.view(…, f·n)[…, i·n : (i+1)·n]

A selection says that the f parts are indexed alike, channel by channel; a slice says that they are
f different groups of channels, as the weight behind them knows. Query, key and value of one
projection are then free of each other.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from qcompiler.edit import Edit
from qcompiler.passes.canonicalize.layout import order_of
from qcompiler.passes.canonicalize.match import is_call
from qcompiler.program import shape_of

aten = torch.ops.aten


def select_before_permute(edit: Edit) -> None:
    """permute(x)[i] is a permutation of x[i]."""
    for node in edit.calls(aten.select.int):
        x, axis, index = node.args
        order = order_of(x)
        if order is None:
            continue
        source = x.args[0]  # type: ignore[union-attr]
        gone = order[axis % len(order)]  # type: ignore[operator]
        left = [a - (a > gone) for a in order if a != gone]
        edit.spend("a selection before the permutation", node)
        part = edit.call(aten.select.int, source, gone, index, like=node)
        new = part
        if left != sorted(left):
            new = edit.call(aten.permute.default, part, left, like=node, replaces=[node])
        edit.replace(node, new)


def slice_constant_index(edit: Edit) -> None:
    """x[:, [2, 3]] is x[:, 2:4]."""
    for node in edit.calls(aten.index.Tensor, aten.index_select.default):
        found = _constant_index(edit, node)
        if found is None:
            continue
        axis, where = found
        size = shape_of(node.args[0])[axis]  # type: ignore[arg-type]
        if where.ndim != 1 or where.dtype == torch.bool or not isinstance(size, int):
            continue
        chosen = (where % size).tolist()
        if not chosen or chosen != list(range(chosen[0], chosen[0] + len(chosen))):
            continue
        edit.spend("an index that counts up is a slice", node)
        args = (node.args[0], axis, chosen[0], chosen[0] + len(chosen))
        edit.replace(node, edit.call(aten.slice.Tensor, *args, like=node, replaces=[node]))


def _constant_index(edit: Edit, node: fx.Node) -> tuple[int, torch.Tensor] | None:
    """(axis, indices), if `node` picks along one axis what a parameter says."""
    if node.target is aten.index_select.default:
        given = [(node.args[1], node.args[2])]
    else:
        given = [(i, n) for i, n in enumerate(node.args[1]) if n is not None]  # type: ignore
    if len(given) != 1 or edit.param_of(given[0][1]) is None:
        return None
    axis, where = given[0]
    return axis % node.meta["val"].ndim, edit.tensor(where)  # type: ignore


def slice_fused(edit: Edit) -> None:
    """The equation above, where one axis of x was split into (…, f, n, …); slices likewise."""
    for node in edit.calls(aten.select.int, aten.slice.Tensor):
        x = node.args[0]
        if not is_call(x, aten.reshape.default):
            continue
        assert isinstance(x, fx.Node)
        axis, first, count = _chosen(node, x)
        end = _end_of_split(x, axis)
        if count is None or end is None:
            continue
        shape, asked = shape_of(x), x.args[1]
        inner = math.prod(shape[axis + 1 : end])  # type: ignore[arg-type]
        sizes = [n if isinstance(n, int) else asked[i] for i, n in enumerate(shape)]  # type: ignore
        merged = [*sizes[:axis], shape[axis] * inner, *sizes[end:]]  # type: ignore[operator]
        kept = [count] if node.target is aten.slice.Tensor else []
        result = [*sizes[:axis], *kept, *sizes[axis + 1 :]]
        edit.spend("a part of a fused projection is a slice of it", node)
        whole = edit.call(aten.reshape.default, x.args[0], merged, like=x)
        bounds = (first * inner, (first + count) * inner)
        part = edit.call(aten.slice.Tensor, whole, axis, *bounds, like=node)
        new = edit.call(aten.reshape.default, part, result, like=node, replaces=[node])
        edit.replace(node, new)


def _chosen(node: fx.Node, x: fx.Node) -> tuple[int, int, int | None]:
    """(axis, first index, number of indices); None if that is not known, or is all of the axis."""
    axis, first, *_ = (*node.args[1:], 0, 0)
    step = node.args[4] if len(node.args) > 4 else 1
    assert isinstance(axis, int)
    axis %= x.meta["val"].ndim
    size = shape_of(x)[axis]
    if node.target is aten.select.int:
        count: object = 1
    else:
        count = shape_of(node)[axis]
    if not all(isinstance(n, int) for n in (size, first, count)) or step != 1 or count == size:
        return axis, 0, None
    return axis, first % size, count  # type: ignore[operator,return-value]


def _end_of_split(reshape: fx.Node, axis: int) -> int | None:
    """The end of the axes of the result that come from one axis of the input, if it has `axis`.

    None if `axis` is the last of them, or if sizes are not fixed.
    """
    shape = shape_of(reshape)
    suffixes = {1}
    for n in reversed(shape_of(reshape.args[0])):  # type: ignore[arg-type]
        if not isinstance(n, int):
            break
        suffixes.add(max(suffixes) * n)
    inner, end = 1, len(shape)
    for i in range(len(shape) - 1, axis, -1):
        n = shape[i]
        if not isinstance(n, int):
            return None
        inner *= n
        if inner in suffixes:
            end = i
    own = shape[axis]
    whole = isinstance(own, int) and any(s % (own * inner) == 0 for s in suffixes)
    return end if end > axis + 1 and whole else None
