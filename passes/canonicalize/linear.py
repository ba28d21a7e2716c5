"""Products with a weight as `linear`, whichever way the source wrote them.

`linear` holds the weight as (out, in); a source that stores it as (in, out) gets a transposition on
the weight's edge, which `fold` evaluates once.
"""

from __future__ import annotations

import torch
from torch import fx

from qcompiler.edit import Edit
from qcompiler.passes.canonicalize.norms import is_call, operands
from qcompiler.passes.canonicalize.tidy import same_size

aten = torch.ops.aten


def raise_linear(edit: Edit) -> None:
    """addmm(b, x, W), mm(x, W) and matmul(x, W) with a weight W (in, out) are linear(x, Wᵀ, b)."""
    for node in edit.calls(aten.addmm.default, aten.mm.default, aten.matmul.default):
        bias = node.args[0] if node.target is aten.addmm.default else None
        x, weight = node.args[-2:]
        if not isinstance(x, fx.Node) or not edit.is_weight(weight):
            continue
        if weight.meta["val"].ndim != 2 or node.kwargs or x.meta["val"].ndim < 2:  # type: ignore[union-attr]
            edit.skip(node, "not a plain product with a matrix")
            continue
        if bias is not None and (not edit.is_weight(bias) or bias.meta["val"].ndim != 1):  # type: ignore[union-attr]
            edit.skip(node, "the summand of addmm is no bias vector")
            continue
        edit.spend("a product with a weight is linear", node)
        new = edit.call(
            aten.linear.default,
            x,
            _transposed(edit, weight, node),
            bias,
            like=node,
            replaces=[node],
        )
        edit.replace(node, new)


def _transposed(edit: Edit, weight: fx.Node, like: fx.Node) -> fx.Node:
    if is_call(weight, aten.t.default) or (
        is_call(weight, aten.transpose.int) and set(weight.args[1:]) in ({0, 1}, {-1, -2})
    ):
        return weight.args[0]  # type: ignore[return-value]
    return edit.call(aten.t.default, weight, like=like)


def absorb_bias(edit: Edit) -> None:
    """linear(x, W) + b with a vector b of the output's size is linear(x, W, b)."""
    for node in edit.calls(aten.add.Tensor):
        for bias, product in operands(node):
            if not edit.is_weight(bias) or not is_call(product, aten.linear.default):
                continue
            has_bias = len(product.args) > 2 and product.args[2] is not None
            if has_bias or len(product.users) > 1 or node.kwargs:
                continue
            if list(bias.meta["val"].shape) != [product.meta["val"].shape[-1]]:
                continue
            if bias.meta["val"].dtype != product.meta["val"].dtype:
                continue
            edit.spend("the summand is the linear's bias", node, product)
            new = edit.call(
                aten.linear.default, *product.args[:2], bias, like=product, replaces=[product, node]
            )
            edit.replace(node, new)
            break


def drop_flattening(edit: Edit) -> None:
    """linear on flattened tokens, reshaped back, is linear on the tokens as they were."""
    for node in edit.calls(aten.reshape.default):
        product = node.args[0]
        if not is_call(product, aten.linear.default) or len(product.users) > 1:  # type: ignore
            continue
        flat = product.args[0]  # type: ignore[union-attr]
        if not is_call(flat, aten.reshape.default):
            continue
        x = flat.args[0]
        before, after = x.meta["val"].shape, node.meta["val"].shape
        kept = len(before) == len(after) and all(map(same_size, before[:-1], after[:-1]))
        if kept and same_size(before[-1], flat.meta["val"].shape[-1]):
            edit.spend("a linear works on the last axis of any shape", node, product)
            new = edit.call(
                aten.linear.default,
                x,
                *product.args[1:],
                like=product,
                replaces=[product, node],  # type: ignore
            )
            edit.replace(node, new)
