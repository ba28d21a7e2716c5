"""Attention that a source spelled out, as one operator.

    softmax(c q kᵀ + mask) v                                    (Vaswani et al. 2017, eq. 1)

Factors on q, on kᵀ and on the scores become one scale; kᵀ may be any permutation of k.
"""

from __future__ import annotations

import torch
from torch import fx

from qcompiler.edit import Edit
from qcompiler.passes.canonicalize.layout import order_of, turned
from qcompiler.passes.canonicalize.masks import fits, leaves_some, unbounded
from qcompiler.passes.canonicalize.match import as_type, is_call, unscaled
from qcompiler.passes.canonicalize.scores import INFINITE, Scores, same_heads, scores_of, unguarded

aten = torch.ops.aten


def raise_attention(edit: Edit) -> None:
    """The equation above, where q, k and v have a batch and heads."""
    infinite: set[fx.Node] | None = None
    for node in edit.calls(aten.matmul.default):
        weights, value = node.args
        p, guarded = unguarded(edit, weights)  # type: ignore[arg-type]
        if not is_call(p, aten.softmax.int, aten._softmax.default) or value.meta["val"].ndim != 4:  # type: ignore[union-attr]
            continue
        if p.args[1] not in (-1, p.meta["val"].ndim - 1):
            continue
        scores = scores_of(edit, p.args[0])  # type: ignore[arg-type]
        if scores is None or not same_heads(scores.product, value):  # type: ignore[arg-type]
            continue
        infinite = unbounded(edit) if infinite is None else infinite
        q, kt = (_operand(edit, x, node) for x in scores.product.args)
        why = _hidden_rows(edit, scores, guarded, infinite) or _unfit(scores, node)
        if q is None or kt is None:
            why = f"its operands are not all {node.meta['val'].dtype}"
        if why:
            edit.skip(node, why)
            continue
        edit.spend("softmax(c q kᵀ + mask) v is attention", node)
        _raise(edit, node, scores, q, kt, value)  # type: ignore[arg-type]


def give_heads(edit: Edit) -> None:
    """Attention without heads has one: kernels and runtimes take four axes."""
    for node in edit.calls(aten.scaled_dot_product_attention.default):
        given = (*node.args[:4], node.kwargs.get("attn_mask"))
        tensors = [x for x in given if isinstance(x, fx.Node)]
        operands, mask = tensors[:3], tensors[3] if len(tensors) > 3 else None
        fits = mask is None or mask.meta["val"].ndim in (2, 3)
        if any(x.meta["val"].ndim != 3 for x in operands) or not fits:
            continue
        if node.kwargs.get("enable_gqa"):  # its first axis is that of heads
            continue
        edit.spend("attention without heads is attention with one", node)
        added = [edit.call(aten.unsqueeze.default, x, 1, like=node) for x in operands]
        kwargs = dict(node.kwargs)
        if mask is not None and mask.meta["val"].ndim == 3:
            mask = edit.call(aten.unsqueeze.default, mask, 1, like=node)
        kwargs.pop("attn_mask", None)
        args = (*added, mask, *node.args[4:])
        whole = edit.call(node.target, *args, like=node, replaces=[node], **kwargs)  # type: ignore[arg-type]
        edit.replace(node, edit.call(aten.squeeze.dim, whole, 1, like=node))


def _hidden_rows(edit: Edit, scores: Scores, guarded: bool, infinite: set[fx.Node]) -> str | None:
    """Why attention would differ where a mask hides a whole row."""
    hides = scores.added in infinite
    if scores.kept is not None and scores.kept[2] == INFINITE:
        hides = hides or not leaves_some(edit, *scores.kept[:2])
    if hides and not guarded:
        return "a row that the mask hides entirely is NaN here, and zero in attention"
    return None


def _unfit(scores: Scores, node: fx.Node) -> str | None:
    """Why the masks cannot be an operand of attention in the type of `node`."""
    dtype = node.meta["val"].dtype
    if scores.added is not None and scores.kept is not None:
        return "a mask is added to the scores and another one replaces some"
    for mask in (scores.added, scores.kept[0] if scores.kept else None):
        if mask is not None and not fits(mask, scores.product):
            return "the mask has more axes than the scores"
    if scores.added is not None and scores.added.meta["val"].dtype != dtype:
        return f"its mask is not {dtype}"
    return None


def _operand(edit: Edit, x: object, like: fx.Node) -> tuple[float, fx.Node] | None:
    """(c, q) with `x` = c q, in the type of `like`."""
    found = as_type(x, like)  # type: ignore[arg-type]
    scale, core = (1.0, None) if found is None else unscaled(edit, found)
    same = core is not None and core.meta["val"].dtype == like.meta["val"].dtype
    return (scale, core) if same else None  # type: ignore[return-value]


def _raise(
    edit: Edit,
    node: fx.Node,
    scores: Scores,
    query: tuple[float, fx.Node],
    key: tuple[float, fx.Node],
    value: fx.Node,
) -> None:
    k_scale, k = _transposed(edit, key[1], node)
    mask = _mask(edit, scores, node)
    scale = scores.scale * query[0] * key[0] * k_scale
    args = (query[1], k, value, mask, 0.0, False)
    target = aten.scaled_dot_product_attention.default
    edit.replace(node, edit.call(target, *args, like=node, replaces=[node], scale=scale))


def _transposed(edit: Edit, kt: fx.Node, like: fx.Node) -> tuple[float, fx.Node]:
    """(c, k) with `kt` = c kᵀ."""
    order, scale = order_of(kt) or [0, 1, 2, 3], 1.0
    if order_of(kt) is not None:
        scale, kt = unscaled(edit, kt.args[0])  # type: ignore[arg-type]
    order[2], order[3] = order[3], order[2]
    return scale, turned(edit, kt, order, like)


def _mask(edit: Edit, scores: Scores, like: fx.Node) -> fx.Node | None:
    if scores.kept is None:
        return scores.added
    condition, kept, fill = scores.kept
    if fill == INFINITE:
        return condition if kept else edit.call(aten.logical_not.default, condition, like=like)
    values = (0.0, fill) if kept else (fill, 0.0)
    mask = edit.call(aten.where.Scalar, condition, *values, like=like)
    dtype = like.meta["val"].dtype
    if mask.meta["val"].dtype != dtype:
        mask = edit.call(aten.to.dtype, mask, dtype, like=like)
    return mask
