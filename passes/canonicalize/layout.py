"""Transpositions, reshapes and casts that follow each other, as one or none.

    permute(permute(x, p), q) = permute(x, p[q])

What only swaps two axes is written `transpose`, and `t` if there are no others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from qcompiler.edit import Edit
from qcompiler.passes.canonicalize.match import is_call
from qcompiler.passes.canonicalize.tidy import CASTS, same_shape, same_size
from qcompiler.program import shape_of

aten = torch.ops.aten

VIEWS = (
    aten.reshape.default,
    aten.view.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
"""Same elements in the same order, in another shape."""


def order_of(node: object) -> list[int] | None:
    """p, if `node` is permute(x, p) in one of its three spellings."""
    if not is_call(node, aten.permute.default, aten.transpose.int, aten.t.default):
        return None
    assert isinstance(node, fx.Node)
    rank = node.meta["val"].ndim
    if node.target is aten.permute.default:
        return [a % rank for a in node.args[1]]  # type: ignore[union-attr,operator]
    order = list(range(rank))
    a, b = node.args[1:3] if node.target is aten.transpose.int else (0, rank - 1)
    order[a], order[b] = order[b], order[a]  # type: ignore[index]
    return order


def turned(
    edit: Edit, x: fx.Node, order: Sequence[int], like: fx.Node, replaces: Sequence[fx.Node] = ()
) -> fx.Node:
    """permute(x, order), with a permutation that `x` itself is taken into it."""
    if (before := order_of(x)) is not None:
        x, order = x.args[0], [before[a] for a in order]  # type: ignore[assignment]
    moved = [a for a, b in enumerate(order) if a != b]
    if not moved:
        return x
    if len(moved) > 2:
        return edit.call(aten.permute.default, x, list(order), like=like, replaces=replaces)
    if len(order) == 2:
        return edit.call(aten.t.default, x, like=like, replaces=replaces)
    return edit.call(aten.transpose.int, x, *moved, like=like, replaces=replaces)


def merge_turns(edit: Edit) -> None:
    """The equation above; and a permutation that swaps two axes is a transposition."""
    for node in edit.calls(aten.permute.default, aten.transpose.int, aten.t.default):
        order, x = order_of(node), node.args[0]
        assert order is not None and isinstance(x, fx.Node)
        few = sum(a != b for a, b in enumerate(order)) <= 2
        if order_of(x) is None and not (few and node.target is aten.permute.default):
            continue
        edit.spend("permutations that follow each other are one", node)
        edit.replace(node, turned(edit, x, order, node, [node]))


def transpose_batches(edit: Edit) -> None:
    """Matrices, flattened to one stack, transposed, and unflattened: their transposition."""
    for node in edit.calls(aten.reshape.default):
        turn = node.args[0]
        stack = turn.args[0] if order_of(turn) == [0, 2, 1] else None  # type: ignore[union-attr]
        if not is_call(stack, aten.reshape.default):
            continue
        x = stack.args[0]  # type: ignore[union-attr]
        before, after = shape_of(x), shape_of(node)  # type: ignore[arg-type]
        expected = (*before[:-2], before[-1], before[-2])
        matrices = shape_of(stack)[1:]  # type: ignore[arg-type]
        if len(before) != len(after) or not all(
            map(same_size, (*expected, *before[-2:]), (*after, *matrices))
        ):
            continue
        rank = len(before)
        order = [*range(rank - 2), rank - 1, rank - 2]
        edit.spend("a transposition of each matrix", node)
        edit.replace(node, turned(edit, x, order, node, [node]))  # type: ignore[arg-type]


def drop_view_chains(edit: Edit) -> None:
    """A chain of reshapes that ends in the shape of one of its values is that value."""
    for node in edit.calls(*VIEWS):
        source = node.args[0]
        while is_call(source, *VIEWS):
            source = source.args[0]  # type: ignore[union-attr]
            if same_shape(source.meta["val"], node.meta["val"]):  # type: ignore[union-attr]
                edit.spend("reshapes that cancel", node)
                edit.replace(node, source)  # type: ignore[arg-type]
                break


def merge_casts(edit: Edit) -> None:
    """x.to(wider).to(type) = x.to(type)."""
    for node in edit.calls(aten.to.dtype):
        inner = node.args[0]
        if not is_call(inner, *CASTS) or len(node.args) != 2:
            continue
        x = inner.args[0]  # type: ignore[union-attr]
        before, between = x.meta["val"].dtype, inner.meta["val"].dtype  # type: ignore[union-attr]
        if _holds(between, before):
            edit.spend("a cast to a wider type first changes nothing", node)
            new = edit.call(aten.to.dtype, x, node.args[1], like=node, replaces=[node])
            edit.replace(node, new)


def unusual(dtype: torch.dtype) -> bool:
    """Types that hold numbers and have hardly any arithmetic."""
    wide_unsigned = (torch.uint16, torch.uint32, torch.uint64)
    return dtype in wide_unsigned or (dtype.is_floating_point and dtype.itemsize == 1)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of type `narrow` is one of type `wide`, by their kinds."""
    same_kind = wide.is_floating_point == narrow.is_floating_point
    if unusual(wide) or unusual(narrow):  # torch promotes neither
        return wide == narrow
    return narrow == torch.bool or (same_kind and torch.promote_types(wide, narrow) == wide)


def select_from_slice(edit: Edit) -> None:
    """x[:, i : i + 1].squeeze(1) is x[:, i]."""
    for node in edit.calls(aten.squeeze.dim, aten.squeeze.dims):
        part, axes = node.args
        if not is_call(part, aten.slice.Tensor) or len(part.args) < 3:  # type: ignore[union-attr]
            continue
        x, axis, start = part.args[:3]  # type: ignore[union-attr]
        rank = shape_of(part)  # type: ignore[arg-type]
        squeezed = [a % len(rank) for a in ([axes] if isinstance(axes, int) else axes)]  # type: ignore
        if squeezed != [axis % len(rank)] or rank[axis] != 1 or not isinstance(start, int):  # type: ignore
            continue
        edit.spend("one part, its axis squeezed, is a selection", node)
        args = (x, squeezed[0], start)
        edit.replace(node, edit.call(aten.select.int, *args, like=node, replaces=[node]))
