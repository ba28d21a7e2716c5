"""Integer arithmetic that a quantized file spells out, as rounded values and stored weights.

    ((q - z) (Qᵀ - zw)) · s · sw = linear(fake_quantize(x), dequantize(Q)),  q = quantize(x, s, z)

(Jacob et al. 2018, eq. 7.) Passes and backends then find the file's weights as `quantize` would
have stored them: packed, one row for each output, with constants for scales and zero points.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from qcompiler.edit import Edit
from qcompiler.formats import QFormat
from qcompiler.passes.canonicalize.layout import VIEWS
from qcompiler.passes.canonicalize.match import MUL, factors, is_call
from qcompiler.passes.canonicalize.stored import constant, stored_weight, value_of
from qcompiler.passes.canonicalize.tidy import CASTS
from qcompiler.program import shape_of

aten = torch.ops.aten
qc = torch.ops.qc

PRODUCTS = {
    aten.matmul.default: aten.linear.default,
    aten.conv1d.default: aten.conv1d.default,
    aten.conv2d.default: aten.conv2d.default,
}
"""Product of integers → the operator with a weight that it stands for."""
MOVES = (
    *VIEWS,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
)
"""What moves, repeats or leaves out elements."""
SCALAR_VIEWS = (aten.reshape.default, aten.squeeze.default, *CASTS)


def raise_rounding(edit: Edit) -> None:
    """dequantize_integers(quantize(x, s, z), s, z) = fake_quantize(x, s, z).

    With one scale, what moves the integers in between moves the rounded numbers just as well.
    """
    for node in edit.calls(qc.dequantize_integers.default):
        q, *way_back, dtype = node.args
        moves: list[fx.Node] = []
        while is_call(q, *MOVES) and QFormat.parse(way_back[0]).block is None:  # type: ignore
            moves.insert(0, q)  # type: ignore[arg-type]
            q = q.args[0]  # type: ignore[union-attr]
        if not is_call(q, qc.quantize.default):
            continue
        x, *way, _integer = q.args  # type: ignore[union-attr]
        if not _same_grid(way, way_back) or x.meta["val"].dtype != dtype:  # type: ignore[union-attr]
            continue
        edit.spend("quantized and dequantized is rounded", node)
        new = _rounded(edit, node, x, way, moves)  # type: ignore[arg-type]
        edit.replace(node, new)


def _rounded(
    edit: Edit, node: fx.Node, x: fx.Node, grid: list[Argument], moves: list[fx.Node]
) -> fx.Node:
    """`x` rounded and moved; where it is read if that is the same, so that a site finds it."""
    text, scale, zero = grid
    rounded = qc.fake_quantize.default
    ranged = is_call(scale, operator.getitem) and _is_range(scale.args[0], x)  # type: ignore
    if ranged:
        x = edit.call(rounded, x, scale.args[0].args[1], like=node, replaces=[node])  # type: ignore
    for move in moves:
        x = edit.call(move.target, x, *move.args[1:], like=move, replaces=[move])  # type: ignore
    if ranged:
        return x
    constants = [constant(edit, n, node) for n in (scale, zero)]  # type: ignore[arg-type]
    return edit.call(rounded, x, text, *constants, like=node, replaces=[node])


def _same_grid(a: Sequence[object], b: Sequence[object]) -> bool:
    """Whether (format, scale, zero point) are equal; single numbers may have been reshaped."""
    values = [[_scalar(n) if isinstance(n, fx.Node) else n for n in grid] for grid in (a, b)]
    return values[0] == values[1]


def raise_integer_products(edit: Edit) -> None:
    """The equation above, for x with a range of its own at run time."""
    for node in edit.calls(*MUL):
        found = _match(edit, node)
        if found is None or found.x.meta["val"].dtype != node.meta["val"].dtype:
            continue
        edit.spend("a product of integers is one of rounded numbers", node, found.product)
        x = edit.call(qc.fake_quantize.default, found.x, found.format, like=node)
        target = PRODUCTS[found.product.target]
        q, rows = edit.tensor(found.weight), target is aten.linear.default
        weight = stored_weight(
            edit, found.weight, q.t() if rows else q, found.scale, found.zero, node
        )
        args = (x, weight, *found.product.args[2:])
        edit.replace(node, edit.call(target, *args, like=node, replaces=[found.product, node]))


@dataclass(frozen=True)
class _Integers:
    """Parts of the left side of the equation."""

    product: fx.Node
    x: fx.Node
    format: str
    weight: fx.Node
    """The parameter Q."""
    zero: Tensor | None
    scale: Tensor


def _match(edit: Edit, node: fx.Node) -> _Integers | None:
    c, parts = factors(edit, node)
    product = next((p for p in map(_scalar, parts) if is_call(p, *PRODUCTS)), None)
    span = next((p for p in map(_scalar, parts) if is_call(p, operator.getitem)), None)
    rest = [p for p in parts if _scalar(p) not in (product, span)]
    if product is None or span is None or len(parts) - len(rest) != 2 or len(rest) > 1:
        return None
    q, zero = _centred(product.args[0])
    weight, weight_zero = _centred(product.args[1])
    if not is_call(q, qc.quantize.default) or edit.param_of(weight) is None:
        return None
    x, _text, s, z, _dtype = q.args
    bounds, given = span.args[0], [_scalar(n) for n in (s, z, zero)]  # type: ignore[arg-type]
    if not _is_range(bounds, x) or not all(is_call(n, operator.getitem) for n in given):
        return None
    if [n.args for n in (span, *given)] != [(bounds, i) for i in (0, 0, 1, 1)]:
        return None
    scale = _per_channel(edit, product, rest, c)
    if scale is None or (weight_zero is not None and not edit.is_weight(weight_zero)):
        return None
    zeros = None if weight_zero is None else value_of(edit, weight_zero)
    return _Integers(product, x, bounds.args[1], weight, zeros, scale)  # type: ignore


def _is_range(node: object, x: object) -> bool:
    return is_call(node, qc.dynamic_scale.default) and node.args[0] is x  # type: ignore


def _scalar(node: fx.Node) -> fx.Node:
    """The value behind casts, and behind reshapes of one number."""
    while is_call(node, *SCALAR_VIEWS):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if node.target not in CASTS and source.meta["val"].numel() != 1:
            break
        node = source
    return node


def _centred(node: object) -> tuple[fx.Node, fx.Node | None]:
    """(q, z), if `node` is q - z in wider integers, or q alone."""
    node = _scalar(node)  # type: ignore[arg-type]
    if is_call(node, aten.sub.Tensor) and isinstance(node.args[1], fx.Node):
        return _scalar(node.args[0]), node.args[1]  # type: ignore[arg-type]
    return node, None


def _per_channel(edit: Edit, product: fx.Node, rest: Sequence[fx.Node], c: float) -> Tensor | None:
    """The weight's scales, float32: one, or one for each output; None if they are no constants."""
    one = torch.tensor(c)
    if not rest:
        return one if one.item() == c else None
    if c != 1 or not edit.is_weight(rest[0]):
        return None
    axis = -1 if product.target is aten.matmul.default else 1
    sizes, scales = shape_of(product), value_of(edit, rest[0])
    wanted = [1] * len(sizes)
    wanted[axis] = scales.numel()
    shape = (*[1] * (len(sizes) - scales.ndim), *scales.shape)
    fits = list(shape) == wanted and scales.numel() in (1, sizes[axis])
    return scales.flatten() if fits and scales.dtype == torch.float32 else None
