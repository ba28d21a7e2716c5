"""No-ops, equal nodes, and splits."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from qcompiler.edit import Edit
from qcompiler.program import is_tensor, op_name

aten = torch.ops.aten

CASTS = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
}
COPIES = {
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
}
RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.slice.Tensor,
}
PADS = {aten.pad.default, aten.constant_pad_nd.default}
NEUTRAL = {aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.add.Tensor: 0, aten.sub.Tensor: 0}


def drop_no_ops(edit: Edit) -> None:
    """x.to(x.dtype), x[:], dropout(x, training=False), x * 1, x.view(x.shape) are all x."""
    for node in edit.calls():
        x = node.args[0] if node.args else None
        if not is_tensor(x) or not is_tensor(node):
            continue
        assert isinstance(x, fx.Node)
        if why := _no_op(node, x):
            edit.spend(why, node)
            edit.replace(node, x)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            # A view demands strides that a dropped copy may have provided; reshape demands none.
            edit.spend("view as reshape, which asks for no strides", node)
            new = edit.call(aten.reshape.default, *node.args, like=node, replaces=[node])
            edit.replace(node, new)


def drop_empty_parts(edit: Edit) -> None:
    """cat([[], x]) is x: what a cache begins with before anything is appended to it."""
    for node in edit.calls(aten.cat.default):
        parts = node.args[0]
        left = [p for p in parts if tuple(p.meta["val"].shape) != (0,)]
        if not left or len(left) == len(parts):
            continue
        edit.spend("an empty part adds nothing", node)
        new = left[0]
        if len(left) > 1:
            new = edit.call(aten.cat.default, left, *node.args[1:], like=node, replaces=[node])
        edit.replace(node, new)


def _no_op(node: fx.Node, x: fx.Node) -> str | None:
    before, after = x.meta["val"], node.meta["val"]
    if node.target in COPIES:
        return "a copy is its original"
    if node.target in CASTS and (before.dtype, before.device) == (after.dtype, after.device):
        return "a cast to the type that it has"
    if node.target in PADS and set(node.args[1]) <= {0}:  # type: ignore[arg-type]
        return "a padding of no width"
    if node.target is aten.dropout.default and node.args[2] is False:
        return "dropout outside training"
    if node.target in RESHAPES and same_shape(before, after):
        return f"{op_name(node.target)} to the shape that it has"
    if node.target in NEUTRAL and len(node.args) > 1 and not node.kwargs.get("alpha"):
        unchanged = before.dtype == after.dtype and same_shape(before, after)
        number = node.args[1]
        if unchanged and isinstance(number, int | float) and number == NEUTRAL[node.target]:  # type: ignore[index]
            return f"{op_name(node.target)} with {number} changes nothing"
    return None


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Equal shapes; symbolic sizes are equal only when they are the same expression."""
    return len(a.shape) == len(b.shape) and all(map(same_size, a.shape, b.shape))


def same_size(m: object, n: object) -> bool:
    """Equal numbers, or the same symbolic expression; never adds a guard."""
    return str(m) == str(n)


def raise_splits(edit: Edit) -> None:
    """split, chunk and unbind become slices and selections, one per part that is read."""
    for node in edit.calls(operator.getitem):
        source, index = node.args
        if not isinstance(source, fx.Node) or not isinstance(index, int):
            continue
        x = source.args[0] if source.args else None
        if source.target is aten.unbind.int and isinstance(x, fx.Node):
            dim = source.args[1] if len(source.args) > 1 else 0
            edit.spend("one part of unbind is a selection", node)
            new = edit.call(aten.select.int, x, dim, index, like=node, replaces=[node])
        elif source.target in (
            aten.split.Tensor,
            aten.split_with_sizes.default,
            aten.split.sizes,
            aten.chunk.default,
        ):
            where = _part(source, index)
            if where is None or not isinstance(x, fx.Node):
                edit.skip(node, "the parts of this split have no fixed sizes")
                continue
            dim, start, end = where
            edit.spend(f"one part of {op_name(source.target)} is a slice", node)
            new = edit.call(aten.slice.Tensor, x, dim, start, end, like=node, replaces=[node])
        else:
            continue
        edit.replace(node, new)


def _part(source: fx.Node, index: int) -> tuple[int, int, int] | None:
    """(axis, start, end) of one part of a split with fixed sizes."""
    parts = source.meta["val"]
    axis = source.args[2] if len(source.args) > 2 else source.kwargs.get("dim", 0)
    assert isinstance(axis, int)
    sizes = [p.shape[axis] for p in parts]
    if not all(isinstance(s, int) for s in sizes):
        return None
    start = sum(sizes[:index])
    return axis, start, start + sizes[index]


def merge_equal(edit: Edit) -> None:
    """Two calls of one operator on the same inputs are one value (common subexpressions)."""
    seen: dict[object, fx.Node] = {}
    for node in edit.calls():
        if not is_tensor(node):
            continue
        key = (node.target, _freeze(node.args), _freeze(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            edit.spend("the same value is computed twice", node, first)
            edit.replace(node, first)


def _freeze(value: object) -> object:
    if isinstance(value, list | tuple):
        return tuple(map(_freeze, value))
    if isinstance(value, dict):
        return tuple((k, _freeze(v)) for k, v in value.items())
    return (type(value).__name__, value)
