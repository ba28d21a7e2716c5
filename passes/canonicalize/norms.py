"""RMSNorm and LayerNorm, raised from the arithmetic that sources spell out.

rms(x)   = x / sqrt(mean(x²) + eps)                       (Zhang & Sennrich 2019, eq. 4)
layer(x) = rms(x - mean(x))                               (Ba et al. 2016, eq. 3)
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.node import Argument

from qcompiler.edit import Edit
from qcompiler.passes.canonicalize.match import (
    ADD,
    DIV,
    as_type,
    is_call,
    is_number,
    is_product,
    operands,
    uncast,
    with_number,
)

aten = torch.ops.aten


def raise_rms_core(edit: Edit) -> None:
    """x · rsqrt(mean(x², -1) + eps), and its spellings with sqrt, reciprocal and pow."""
    for node in edit.calls(aten.mul.Tensor, aten.div.Tensor):
        for x, factor in operands(node):
            eps = _inverse_rms(edit, node, x, factor)
            if eps is not None:
                size = x.meta["val"].shape[-1]
                if not isinstance(size, int):
                    edit.skip(node, "an RMSNorm over a dynamic size")
                    break
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
            x = as_type(x, node)
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
        for bias, norm in operands(node) if not node.kwargs else ():
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


def _inverse_rms(edit: Edit, node: fx.Node, x: fx.Node, factor: fx.Node) -> float | None:
    """eps, if `node` is x / sqrt(mean(x²) + eps) with that `factor`."""
    total = _under_root(factor) if node.target is aten.div.Tensor else _under_inverse(edit, factor)
    found = with_number(edit, total, *ADD)
    if found is None or not is_call(found[0], aten.mean.dim) or not _last_axis(found[0]):
        return None
    mean, eps = found
    return eps if is_product(edit, mean.args[0], 1, x, x) else None  # type: ignore[arg-type]


def _under_root(node: object) -> object:
    """x, if `node` is √x."""
    root = is_call(node, aten.sqrt.default) or (
        is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == 0.5  # type: ignore[attr-defined]
    )
    return node.args[0] if root else None  # type: ignore[attr-defined]


def _under_inverse(edit: Edit, node: fx.Node) -> object:
    """x, if `node` is 1 / √x."""
    power = is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == -0.5
    if power or is_call(node, aten.rsqrt.default):
        return node.args[0]
    if is_call(node, *DIV) and is_number(edit, node.args[0], 1):
        return _under_root(node.args[1])
    return _under_root(node.args[0]) if is_call(node, aten.reciprocal.default) else None


def _last_axis(mean: object) -> bool:
    """Whether `mean` is over the last axis alone, and keeps it."""
    assert isinstance(mean, fx.Node)
    axes, keep = mean.args[1], len(mean.args) > 2 and mean.args[2]
    last = mean.args[0].meta["val"].ndim - 1  # type: ignore[union-attr]
    return bool(keep) and axes in ([-1], [last])
