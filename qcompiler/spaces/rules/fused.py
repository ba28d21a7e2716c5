"""Rules of fused operators, with their hidden intermediate values: norms, attention, rotary."""

from __future__ import annotations

import torch
from torch import fx

from qcompiler.program import is_tensor, op_name, shape_of
from qcompiler.spaces.axes import (
    ALL,
    CENTRING,
    DIAGONAL,
    ORTHOGONAL,
    PERMUTATION,
    SHIFT,
    Absorbed,
    Axes,
    Mixed,
    Place,
    Value,
)
from qcompiler.spaces.rules.common import input_of, told_apart, try_unify, unknown
from qcompiler.spaces.terms import Conflict, Prod, cut, fresh, size, unify

aten = torch.ops.aten


def norm(axes: Axes, node: fx.Node) -> None:
    """core(x) · gain + bias. Rotations pass the core of RMSNorm; gain and bias carry scales."""
    x, gain, bias = (input_of(axes, node, i) for i in (0, 2, 3))
    if x is None:
        return unknown(axes, node)
    result = axes.new(node)
    core = axes.new(node, virtual=True, axes=list(x.axes))
    why = f"{op_name(node.target)} normalises it"
    *others, last = range(len(x.axes))
    passes: frozenset[str] = frozenset()
    if len(node.args[1]) == 1:  # type: ignore[arg-type]
        passes = ORTHOGONAL if node.target is aten.rms_norm.default else CENTRING
    axes.mark(node, x, why, kinds=ALL - passes - PERMUTATION)
    axes.mark(node, x, why, others, passes)
    axes.all_same(node, x, core, PERMUTATION)
    if passes == ORTHOGONAL:
        axes.mark(node, core, why, kinds=ALL - passes - PERMUTATION)
        axes.mark(node, core, why, others, passes)
        axes.same(node, [([Place(x, last)], [Place(core, last)])], ORTHOGONAL)
    else:  # LayerNorm takes the mean off by itself; what it returns has none
        axes.mark(node, core, why, kinds=ALL - PERMUTATION)
    text, operands = ("*, * -> *", [core, gain]) if gain else ("* -> *", [core])
    axes.product(node, text, operands, result, "told")
    if bias is not None and node.target is aten.layer_norm.default:
        axes.product(node, "* -> *", [bias], result, "told")
    _norm_shift(axes, node, result, bias)
    return None


def _norm_shift(axes: Axes, node: fx.Node, result: Value, bias: Value | None) -> None:
    *others, last = range(len(result.axes))
    axes.mark(node, result, f"{op_name(node.target)} passes no shift", others, SHIFT)
    vector = bias is not None and len(bias.axes) == 1 and bias.node not in axes.program.activations
    if vector and node.target is aten.layer_norm.default:
        axes.statements.append(Absorbed(node, Place(result, last), produces=True))
    else:
        axes.mark(node, result, f"{op_name(node.target)} has no bias", [last], SHIFT)


def attention(axes: Axes, node: fx.Node) -> None:
    """softmax(q kᵀ) v with its hidden scores; query heads (g r) share key/value head g."""
    q, k, v = (input_of(axes, node, i) for i in range(3))
    if q is None or k is None or v is None or len(q.axes) != 4:
        return unknown(axes, node)
    result = axes.new(node)
    heads, shared = shape_of(node.args[0])[1], shape_of(node.args[1])[1]  # type: ignore[arg-type]
    repeat = heads // shared if isinstance(heads, int) and isinstance(shared, int) else 1
    group = v.axes[1]
    try_unify(group, k.axes[1])
    wide_q = _grouped(axes, node, q, group, repeat)
    wide_out = _grouped(axes, node, result, group, repeat)
    scores = axes.new(
        node,
        virtual=True,
        axes=[q.axes[0], group, wide_q.axes[2], q.axes[2], k.axes[2]],
    )
    axes.product(node, "b g r s d, b g t d -> b g r s t", [wide_q, k], scores)
    axes.mark(node, scores, "softmax does not commute with it", kinds=ALL - PERMUTATION)
    axes.mark(node, scores, "the attention mask tells it apart", _masked(node), PERMUTATION)
    axes.product(node, "b g r s t, b g t e -> b g r s e", [scores, v], wide_out, "told")
    # The rows of softmax add up to 1, so that what is added to all values is added to the output.
    kept = [([Place(v, i)], [Place(wide_out, j)]) for i, j in ((0, 0), (1, 1), (3, 4))]
    axes.same(node, kept, SHIFT)
    for value, others in ((v, (0, 1, 2)), (wide_out, (0, 1, 2, 3))):
        axes.mark(node, value, "attention averages over it", others, SHIFT)
    return None


def _masked(node: fx.Node) -> list[int]:
    """Axes of the scores (batch, group, repeat, query, key) that a mask tells apart."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
    seen = {3, 4} if causal else set()
    if is_tensor(mask):
        sizes = shape_of(mask)  # type: ignore[arg-type]
        for place, n in zip((4, 3, 1, 0), reversed(sizes), strict=False):
            seen |= ({1, 2} if place == 1 else {place}) if n != 1 else set()
    return sorted(seen)


def _grouped(axes: Axes, node: fx.Node, x: Value, group: object, repeat: int) -> Value:
    """(b, g·r, s, d) seen as (b, g, r, s, d)."""
    factor = fresh(repeat)
    wide = axes.new(
        node,
        virtual=True,
        axes=[x.axes[0], group, factor, x.axes[2], x.axes[3]],  # type: ignore[list-item]
    )
    split = [Place(wide, 1), Place(wide, 2)] if repeat > 1 else [Place(wide, 1)]
    pairs = [([Place(x, 0)], [Place(wide, 0)]), ([Place(x, 1)], split)]
    pairs += [([Place(x, i)], [Place(wide, i + 1)]) for i in (2, 3)]
    axes.same(node, pairs)
    return wide


def rope(axes: Axes, node: fx.Node) -> None:
    """Mixes channel i with i + d/2 (or 2i with 2i + 1): both must take the same scale."""
    x = input_of(axes, node)
    if x is None:
        return unknown(axes, node)
    result = axes.new(node)
    interleaved = len(node.args) > 3 and node.args[3]
    last, width = x.axes[-1], shape_of(node)[-1]
    assert isinstance(width, int)
    try:
        if interleaved:
            unify(last, Prod((fresh(width // 2), fresh(2))))
            axes.mark(node, x, "an interleaved rotary embedding", [len(x.axes) - 1])
        else:
            unify(*cut(last, width // 2))
    except Conflict:
        axes.mark(node, x, "its channels do not split into rotary pairs")
    *others, last_axis = range(len(x.axes))
    axes.same(node, [([Place(x, i)], [Place(result, i)]) for i in others])
    through = DIAGONAL | PERMUTATION
    axes.same(node, [([Place(x, last_axis)], [Place(result, last_axis)])], through)
    for value in (x, result):
        axes.statements.append(Mixed(node, Place(value, last_axis)))
        axes.mark(node, value, "a rotary embedding mixes it in pairs", [last_axis], ALL - through)
    for operand in node.args[1:3]:
        if table := axes.of(operand):
            axes.mark(node, table, "it is a table of rotation angles", kinds=ALL - PERMUTATION)
            _beside_table(axes, node, x, table)
    told_apart(axes, node, x, *node.args[1:3])
    return None


def _beside_table(axes: Axes, node: fx.Node, x: Value, table: Value) -> None:
    """The angles follow another order of pairs or positions, axes counted from the right."""
    first = len(x.axes) - len(table.axes)
    for axis, term in enumerate(table.axes):
        if size(term) != 1:
            axes.same(node, [([Place(x, first + axis)], [Place(table, axis)])], PERMUTATION)
