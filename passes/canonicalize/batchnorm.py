"""BatchNorm in evaluation mode, folded into the convolution or linear before it.

    BN(W x + b) = (a W) x + a (b - mean) + beta,   a = gamma / sqrt(var + eps)

(Jacob et al. 2018, section 3.2). The new weight and bias are expressions on their edges.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from qcompiler.edit import Edit
from qcompiler.passes.canonicalize.match import is_call

aten = torch.ops.aten


def raise_batch_norm(edit: Edit) -> None:
    """The first result of the decomposed operator in evaluation mode."""
    for node in edit.calls(operator.getitem):
        source, index = node.args
        if index == 0 and is_call(source, aten._native_batch_norm_legit_no_training.default):
            assert isinstance(source, fx.Node)
            *tensors, momentum, eps = source.args
            edit.spend("BatchNorm in evaluation mode", node)
            args = (*tensors, False, momentum, eps, False)
            new = edit.call(aten.batch_norm.default, *args, like=node, replaces=[source, node])
            edit.replace(node, new)


def fold_batch_norm(edit: Edit) -> None:
    """Fold each batch_norm whose input is a convolution or linear that nobody else reads."""
    for node in edit.calls(aten.batch_norm.default):
        x, gamma, beta, mean, var, training, _momentum, eps, *_ = node.args
        if training:
            edit.skip(node, "normalises with the statistics of the batch (training mode)")
            continue
        if not is_call(x, aten.conv2d.default, aten.conv1d.default, aten.linear.default):
            edit.skip(node, "no convolution or linear in front of this BatchNorm")
            continue
        if len(x.users) > 1:  # type: ignore[union-attr]
            edit.skip(node, "its input is read by others too")
            continue
        edit.spend("BatchNorm scales and shifts the channels of the layer before it", node, x)
        _fold(edit, node, x, (gamma, beta, mean, var), eps)  # type: ignore[arg-type]


def _fold(
    edit: Edit, node: fx.Node, x: fx.Node, stats: tuple[fx.Node | None, ...], eps: float
) -> None:
    gamma, beta, mean, var = stats
    weight = x.args[1]
    bias = x.args[2] if len(x.args) > 2 else None
    scale = edit.call(
        aten.rsqrt.default, edit.call(aten.add.Scalar, var, eps, like=node), like=node
    )
    if gamma is not None:
        scale = edit.call(aten.mul.Tensor, gamma, scale, like=node)
    column = [-1] + [1] * (weight.meta["val"].ndim - 1)  # type: ignore[union-attr]
    per_row = edit.call(aten.reshape.default, scale, column, like=node)
    new_weight = edit.call(aten.mul.Tensor, weight, per_row, like=x)
    shift = (
        edit.call(aten.neg.default, mean, like=node)
        if bias is None
        else edit.call(aten.sub.Tensor, bias, mean, like=node)
    )
    new_bias = edit.call(aten.mul.Tensor, shift, scale, like=node)
    if beta is not None:
        new_bias = edit.call(aten.add.Tensor, new_bias, beta, like=node)
    args = (x.args[0], new_weight, new_bias, *x.args[3:])
    new = edit.call(x.target, *args, like=x, replaces=[x, node])  # type: ignore[arg-type]
    edit.replace(node, new)
