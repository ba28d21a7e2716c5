"""Products with a weight as `linear`, whichever way the source wrote them.

`linear` holds the weight as (out, in); a weight that the source stores as (in, out) is turned.
"""

from __future__ import annotations

import torch
from torch import fx

from qcompiler.edit import Edit
from qcompiler.passes.canonicalize.match import is_call, operands
from qcompiler.passes.canonicalize.tidy import same_size
from qcompiler.program import shape_of

aten = torch.ops.aten

CHANNEL = {aten.linear.default: -1, aten.conv1d.default: -2, aten.conv2d.default: -3}
"""Operator → axis of its outputs' channels."""


def raise_linear(edit: Edit) -> None:
    """addmm(b, x, W), mm(x, W) and matmul(x, W) with a weight W (in, out) are linear(x, Wᵀ, b)."""
    for node in edit.calls(aten.addmm.default, aten.mm.default, aten.matmul.default):
        bias = node.args[0] if node.target is aten.addmm.default else None
        x, weight = node.args[-2:]
        floating = node.meta["val"].is_floating_point()
        if not isinstance(x, fx.Node) or not edit.is_weight(weight) or not floating:
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


def store_turned(edit: Edit) -> None:
    """A weight that is only read transposed is stored transposed, as (out, in)."""
    for node in edit.calls(aten.t.default):
        weight = node.args[0]
        if edit.param_of(weight) is None:
            continue
        assert isinstance(weight, fx.Node)
        turns = list(weight.users)
        if all(is_call(turn, aten.t.default) for turn in turns):
            edit.spend("stored as linear reads it", weight, *turns)
            edit.set_param(weight, edit.tensor(weight).t().contiguous())
            for turn in turns:
                edit.replace(turn, weight)


def absorb_bias(edit: Edit) -> None:
    """linear(x, W) + b with one number for each output is linear(x, W, b); conv likewise."""
    for node in edit.calls(aten.add.Tensor):
        for bias, product in operands(node):
            if not edit.is_weight(bias) or not is_call(product, *CHANNEL):
                continue
            has_bias = len(product.args) > 2 and product.args[2] is not None
            if has_bias or len(product.users) > 1 or node.kwargs:
                continue
            if not _one_each(bias, product, CHANNEL[product.target]):
                continue
            if bias.meta["val"].dtype != product.meta["val"].dtype:
                continue
            edit.spend("the summand is the bias", node, product)
            if len(shape_of(bias)) > 1:
                bias = edit.call(aten.reshape.default, bias, [-1], like=node)
            args = (*product.args[:2], bias, *product.args[3:])
            both = [product, node]
            new = edit.call(product.target, *args, like=product, replaces=both)  # type: ignore
            edit.replace(node, new)
            break


def _one_each(bias: fx.Node, product: fx.Node, channel: int) -> bool:
    """Whether `bias` holds one number for each index of the axis `channel` of `product`."""
    have, sizes = shape_of(bias), shape_of(product)
    wanted: list[object] = [1] * len(sizes)
    wanted[channel] = sizes[channel]
    return list(have) == wanted[len(sizes) - len(have) :] and sizes[channel] in have


def drop_flattening(edit: Edit) -> None:
    """linear on flattened tokens, reshaped to (…, out), is linear on x reshaped to (…, in)."""
    for node in edit.calls(aten.reshape.default):
        product, sizes = node.args
        if not is_call(product, aten.linear.default) or len(product.users) > 1:  # type: ignore
            continue
        flat = product.args[0]  # type: ignore[union-attr]
        out = node.meta["val"].shape[-1]
        if not is_call(flat, aten.reshape.default) or flat.meta["val"].ndim != 2:
            continue
        if len(shape_of(node)) < 2 or not same_size(out, shape_of(product)[-1]):  # type: ignore
            continue
        edit.spend("a linear works on the last axis of any shape", node, product)
        wanted = [*sizes[:-1], shape_of(flat)[-1]]  # type: ignore[index]
        x = edit.call(aten.reshape.default, flat.args[0], wanted, like=flat, replaces=[flat])
        args = (x, *product.args[1:])  # type: ignore[union-attr]
        both = [product, node]
        new = edit.call(aten.linear.default, *args, like=product, replaces=both)  # type: ignore
        edit.replace(node, new)
