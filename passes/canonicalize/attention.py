"""Rotary embedding and grouped-query attention."""

from __future__ import annotations

import torch
from torch import fx

from qcompiler.edit import Edit
from qcompiler.passes.canonicalize.match import is_call, operands

aten = torch.ops.aten


def raise_rope(edit: Edit) -> None:
    """x · cos + rot(x) · sin is a rotary embedding (Su et al. 2021, eq. 34)."""
    for node in edit.calls(aten.add.Tensor):
        for left, right in operands(node):
            if not is_call(left, aten.mul.Tensor) or not is_call(right, aten.mul.Tensor):
                continue
            match = _rope(left, right)
            if match:
                x, cos, sin, interleaved = match
                edit.spend("x · cos + rot(x) · sin is a rotary embedding", node)
                new = edit.call(
                    torch.ops.qc.rope.default, x, cos, sin, interleaved, like=node, replaces=[node]
                )
                edit.replace(node, new)
                break


def _rope(left: fx.Node, right: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, bool] | None:
    for turned, sin in operands(right):
        for x, cos in operands(left):
            if _rotated_halves(turned) is x:
                return x, cos, sin, False
            if _rotated_pairs(turned) is x:
                return x, cos, sin, True
    return None


def _rotated_halves(node: fx.Node) -> fx.Node | None:
    """x, if `node` is cat(-x[d/2:], x[:d/2]) over the last axis."""
    if not is_call(node, aten.cat.default) or not _is_last(node, node.args[1:]):
        return None
    parts = node.args[0]
    if len(parts) != 2 or not is_call(parts[0], aten.neg.default):  # type: ignore
        return None
    second, first = parts[0].args[0], parts[1]  # type: ignore
    if not is_call(first, aten.slice.Tensor) or not is_call(second, aten.slice.Tensor):
        return None
    x = first.args[0]
    half = x.meta["val"].shape[-1] // 2
    low, high = _slice(first), _slice(second)
    return (
        x if second.args[0] is x and low == (0, half, 1) and high == (half, 2 * half, 1) else None
    )


def _rotated_pairs(node: fx.Node) -> fx.Node | None:
    """x, if `node` is stack(-x[1::2], x[::2], -1).flatten(-2)."""
    if not is_call(node, aten.flatten.using_ints, aten.reshape.default):
        return None
    stack = node.args[0]
    if not is_call(stack, aten.stack.default) or stack.args[1] not in (
        -1,
        stack.meta["val"].ndim - 1,
    ):  # type: ignore
        return None
    odd, even = stack.args[0]  # type: ignore
    if not is_call(odd, aten.neg.default) or not is_call(even, aten.slice.Tensor):
        return None
    odd, x = odd.args[0], even.args[0]
    if not is_call(odd, aten.slice.Tensor) or odd.args[0] is not x:
        return None
    size = x.meta["val"].shape[-1]
    same = node.meta["val"].shape[-1] == size and node.meta["val"].ndim == x.meta["val"].ndim
    return x if same and _slice(even) == (0, size, 2) and _slice(odd) == (1, size, 2) else None


def _slice(node: fx.Node) -> tuple[int, int, int] | None:
    """(start, end, step) of a slice of the last axis, end within it; None for another axis."""
    x, axis, start, end, step = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    size = x.meta["val"].shape[-1]  # type: ignore[union-attr]
    if axis not in (-1, x.meta["val"].ndim - 1) or not isinstance(size, int):  # type: ignore[union-attr]
        return None
    start, end = start or 0, size if end is None else min(end, size)  # type: ignore
    return (start if start >= 0 else start + size, end if end >= 0 else end + size, step)  # type: ignore


def _is_last(node: fx.Node, axes: tuple[object, ...]) -> bool:
    return bool(axes) and axes[0] in (-1, node.meta["val"].ndim - 1)


def raise_grouped_heads(edit: Edit) -> None:
    """Attention on repeated key/value heads is grouped-query attention (Ainslie et al. 2023)."""
    for node in edit.calls(aten.scaled_dot_product_attention.default):
        query, key, value, *rest = node.args
        k, v = _unrepeated(key), _unrepeated(value)
        if k is None or v is None:
            continue
        edit.spend("repeated key/value heads are grouped-query attention", node)
        kwargs = {**node.kwargs, "enable_gqa": True}
        new = edit.call(node.target, query, k, v, *rest, like=node, replaces=[node], **kwargs)
        edit.replace(node, new)


def _unrepeated(node: object) -> fx.Node | None:
    """x (B, H, S, D), if `node` is x[:, :, None].expand(B, H, G, S, D).reshape(B, H·G, S, D)."""
    if not is_call(node, aten.reshape.default):
        return None
    wide = node.args[0]  # type: ignore[union-attr]
    if not is_call(wide, aten.expand.default) or not is_call(wide.args[0], aten.unsqueeze.default):
        return None
    x, axis = wide.args[0].args
    heads = x.meta["val"].shape[1]
    shape, merged = wide.meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    right = axis == 2 and len(shape) == 5 and len(merged) == 4
    return x if right and merged[1] == heads * shape[2] and shape[1] == heads else None
