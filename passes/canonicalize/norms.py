"""RMSNorm and LayerNorm, raised from the arithmetic that sources spell out.

rms(x)   = x / sqrt(mean(x²) + eps)                       (Zhang & Sennrich 2019, eq. 4)
layer(x) = rms(x - mean(x))                               (Ba et al. 2016, eq. 3)
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.node import Argument

from qcompiler.edit import Edit
from qcompiler.passes.canonicalize.tidy import CASTS

aten = torch.ops.aten


def raise_rms_core(edit: Edit) -> None:
    """x · rsqrt(mean(x², -1) + eps), and its spellings with sqrt, reciprocal and pow."""
    for node in edit.calls(aten.mul.Tensor, aten.div.Tensor):
        for x, factor in operands(node):
            eps = _inverse_rms(node, x, factor)
            if eps is not None:
                size = x.meta["val"].shape[-1]
                edit.spend("x / sqrt(mean(x²) + eps) is an RMSNorm", node)
                new = edit.call(
                    aten.rms_norm.default, x, [size], None, eps, like=node, replaces=[node]
                )
                edit.replace(node, new)
                break


def raise_layer_norm(edit: Edit) -> None:
    """rms(x - mean(x)) is a LayerNorm without gain and bias."""
    for node in edit.calls(aten.rms_norm.default):
        centred, size, gain, eps = _padded(node, 4)
        if gain is not None or eps is None or not isinstance(centred, fx.Node):
            continue  # without an eps of its own it takes that of the type it is computed in
        if centred.target is not aten.sub.Tensor:
            continue
        x, mean = centred.args
        if is_call(mean, aten.mean.dim) and mean.args[0] is x and _last_axis(mean):  # type: ignore[union-attr]
            edit.spend("an RMSNorm of x - mean(x) is a LayerNorm", node, centred)
            new = edit.call(
                aten.layer_norm.default, x, size, None, None, eps, like=node, replaces=[node]
            )
            edit.replace(node, new)


def absorb_gain(edit: Edit) -> None:
    """gain · norm(x) is norm(x) with that gain; casts in between only round."""
    for node in edit.calls(aten.mul.Tensor):
        for gain, normed in operands(node):
            norm = uncast(normed)
            if not edit.is_weight(gain) or not is_call(
                norm, aten.rms_norm.default, aten.layer_norm.default
            ):
                continue
            x, size, old, *rest = _padded(norm, 3)
            if old is not None or list(gain.meta["val"].shape) != size or len(norm.users) > 1:
                continue
            if rest and norm.target is aten.layer_norm.default and rest[0] is not None:
                continue  # the bias is added before this factor
            x = _as_type(x, node)
            if x is None:
                edit.skip(node, "the gain changes the type of the norm's output")
                continue
            edit.spend("the factor is the norm's gain", node, norm)
            new = edit.call(norm.target, x, size, gain, *rest, like=node, replaces=[norm, node])
            edit.replace(node, new)
            break


def absorb_bias(edit: Edit) -> None:
    """layer(x) + bias is a LayerNorm with that bias."""
    for node in edit.calls(aten.add.Tensor):
        for bias, norm in operands(node):
            if not edit.is_weight(bias) or not is_call(norm, aten.layer_norm.default):
                continue
            x, size, gain, old, *rest = _padded(norm, 4)
            if old is None and list(bias.meta["val"].shape) == size and len(norm.users) == 1:
                edit.spend("the summand is the norm's bias", node, norm)
                new = edit.call(
                    norm.target, x, size, gain, bias, *rest, like=node, replaces=[norm, node]
                )
                edit.replace(node, new)
                break


def _padded(node: fx.Node, count: int) -> tuple[Argument, ...]:
    """The arguments, with None for the ones left out up to `count`."""
    return (*node.args, *[None] * (count - len(node.args)))


def operands(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The two tensor operands of a binary call, in both orders (division: as written)."""
    if len(node.args) < 2 or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return []
    a, b = node.args[:2]
    both = [(a, b)] if node.target is aten.div.Tensor else [(a, b), (b, a)]
    return both  # type: ignore[return-value]


def is_call(node: object, *targets: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def uncast(node: fx.Node) -> fx.Node:
    """The value behind casts between floating point types."""
    while node.op == "call_function" and node.target in CASTS:
        source = node.args[0]
        if not isinstance(source, fx.Node) or not source.meta["val"].is_floating_point():
            break
        if not node.meta["val"].is_floating_point():
            break
        node = source
    return node


def _as_type(x: fx.Node, like: fx.Node) -> fx.Node | None:
    """`x`, or the value that it was cast from, in the type of `like`."""
    for value in (x, uncast(x)):
        if value.meta["val"].dtype == like.meta["val"].dtype:
            return value
    return None


def _inverse_rms(node: fx.Node, x: fx.Node, factor: fx.Node) -> float | None:
    """eps, if `node` is x / sqrt(mean(x²) + eps) with that `factor`."""
    if node.target is aten.div.Tensor:
        root = factor
        if not is_call(root, aten.sqrt.default):
            return None
    elif is_call(factor, aten.rsqrt.default) or (
        is_call(factor, aten.pow.Tensor_Scalar) and factor.args[1] == -0.5
    ):
        root = factor
    elif is_call(factor, aten.reciprocal.default) and is_call(factor.args[0], aten.sqrt.default):
        root = factor.args[0]  # type: ignore[assignment]
    else:
        return None
    total = root.args[0]
    if not is_call(total, aten.add.Tensor, aten.add.Scalar):
        return None
    mean, eps = total.args  # type: ignore[union-attr]
    if not is_call(mean, aten.mean.dim) or not isinstance(eps, float) or not _last_axis(mean):
        return None
    square = mean.args[0]
    squared = (
        square.args[0]
        if is_call(square, aten.pow.Tensor_Scalar) and square.args[1] == 2
        else square.args[0]
        if is_call(square, aten.mul.Tensor) and square.args[0] is square.args[1]
        else None
    )
    return eps if squared is x else None


def _last_axis(mean: object) -> bool:
    """Whether `mean` is over the last axis alone, and keeps it."""
    assert isinstance(mean, fx.Node)
    axes, keep = mean.args[1], len(mean.args) > 2 and mean.args[2]
    last = mean.args[0].meta["val"].ndim - 1  # type: ignore[union-attr]
    return bool(keep) and axes in ([-1], [last])
