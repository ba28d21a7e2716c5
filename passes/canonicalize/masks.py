"""What a mask on attention scores means, and whether it can hide a whole row.

`softmax` of a row that is -inf throughout is NaN, while `scaled_dot_product_attention` gives zeros.
So a mask becomes an operand only where the source replaces NaN by 0 too, or where no row is hidden.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from qcompiler.edit import Edit
from qcompiler.passes.canonicalize.match import is_call, number
from qcompiler.passes.canonicalize.tidy import same_size
from qcompiler.program import is_tensor, shape_of

aten = torch.ops.aten

WHERE = (
    aten.where.self,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.where.Scalar,
)
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
UNBOUNDED = (
    aten.log.default,
    aten.log2.default,
    aten.log10.default,
    aten.log1p.default,
    aten.reciprocal.default,
    aten.rsqrt.default,
)
"""What makes infinity of a number, beside division by a tensor."""
HUGE = 1e30
"""Beside a number as large as this, every score is zero, as it is rounded."""


def choice(node: object) -> tuple[fx.Node, object, object] | None:
    """(condition, a, b), if `node` is a where the condition holds and b elsewhere."""
    if is_call(node, *WHERE):
        return tuple(node.args)  # type: ignore[attr-defined,return-value]
    if is_call(node, *FILLS):
        x, condition, value = node.args  # type: ignore[attr-defined]
        return condition, value, x
    return None


def filled(edit: Edit, node: object) -> tuple[object, fx.Node, bool, float] | None:
    """(x, condition, kept, c), if `node` is x where the condition is `kept`, and elsewhere c."""
    found = choice(node)
    if found is None:
        return None
    condition, a, b = found
    if (fill := number(edit, b)) is not None:
        return a, condition, True, fill
    fill = number(edit, a)
    return None if fill is None else (b, condition, False, fill)


def kept_by(edit: Edit, mask: fx.Node) -> tuple[fx.Node, bool] | None:
    """(condition, kept), if the summand `mask` is 0 where it is `kept`, and elsewhere -inf."""
    found = choice(mask)
    if found is None:
        return None
    condition, a, b = found
    values = number(edit, a), number(edit, b)
    if values == (0, -math.inf):
        return condition, True
    return (condition, False) if values == (-math.inf, 0) else None


def fits(mask: fx.Node, scores: fx.Node) -> bool:
    """Whether `mask` broadcasts to the shape of `scores` and no further."""
    sizes, wanted = shape_of(mask), shape_of(scores)
    if not 2 <= len(sizes) <= len(wanted):
        return False
    pairs = zip(reversed(sizes), reversed(wanted), strict=False)
    return all(same_size(m, 1) or same_size(m, n) for m, n in pairs)


def unbounded(edit: Edit) -> set[fx.Node]:
    """Floating point values that may be infinite: a constant or a parameter on the way is, an input
    of the model may be, or they become so on the way."""
    found: set[fx.Node] = set()
    for node in edit.nodes:
        given = node.op == "placeholder" and is_tensor(node)
        if not given or not node.meta["val"].is_floating_point():
            continue
        if edit.param_of(node) is None or bool(edit.tensor(node).isinf().any()):
            found.add(node)
    for node in edit.calls():
        if not is_tensor(node) or not node.meta["val"].is_floating_point():
            continue
        infinite = any(isinstance(a, float) and math.isinf(a) for a in node.args)
        divided = node.target is aten.div.Tensor and isinstance(node.args[1], fx.Node)
        made = infinite or divided or node.target in UNBOUNDED
        if made or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def leaves_some(edit: Edit, condition: fx.Node, kept: bool) -> bool:
    """Whether each row of a condition that is a parameter, or rows of it, is `kept` somewhere.

    The first column is what every part of a causal mask keeps.
    """
    columns = True
    while is_call(condition, aten.slice.Tensor):
        axis, start = (*condition.args[1:3], 0, 0)[:2]
        last = axis in (-1, condition.meta["val"].ndim - 1)
        if last and start not in (0, None):
            return False
        columns = columns and not last
        condition = condition.args[0]  # type: ignore[assignment]
    if edit.param_of(condition) is None:
        return False
    shown = edit.tensor(condition).bool() == kept
    return bool((shown.any(-1) if columns else shown[..., 0]).all())
