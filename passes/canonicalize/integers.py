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

from qcompiler.edit import Edit
from qcompiler.passes.canonicalize.match import MUL, factors, is_call
from qcompiler.passes.canonicalize.rounding import is_range, scalar
from qcompiler.passes.canonicalize.stored import stored_weight, value_of
from qcompiler.program import shape_of

aten = torch.ops.aten
qc = torch.ops.qc

PRODUCTS = {
    aten.matmul.default: aten.linear.default,
    aten.conv1d.default: aten.conv1d.default,
    aten.conv2d.default: aten.conv2d.default,
}
"""Product of integers → the operator with a weight that it stands for."""


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
    product = next((p for p in map(scalar, parts) if is_call(p, *PRODUCTS)), None)
    span = next((p for p in map(scalar, parts) if is_call(p, operator.getitem)), None)
    rest = [p for p in parts if scalar(p) not in (product, span)]
    if product is None or span is None or len(parts) - len(rest) != 2 or len(rest) > 1:
        return None
    q, zero = _centred(product.args[0])
    weight, weight_zero = _centred(product.args[1])
    if not is_call(q, qc.quantize.default) or edit.param_of(weight) is None:
        return None
    if product.target is aten.matmul.default and edit.tensor(weight).ndim != 2:
        return None
    x, _text, s, z, _dtype = q.args
    bounds, given = span.args[0], [scalar(n) for n in (s, z, zero)]  # type: ignore[arg-type]
    if not is_range(bounds, x) or not all(is_call(n, operator.getitem) for n in given):
        return None
    if [n.args for n in (span, *given)] != [(bounds, i) for i in (0, 0, 1, 1)]:
        return None
    scale = _per_channel(edit, product, rest, c)
    if scale is None or (weight_zero is not None and not edit.is_weight(weight_zero)):
        return None
    zeros = None if weight_zero is None else value_of(edit, weight_zero)
    return _Integers(product, x, bounds.args[1], weight, zeros, scale)  # type: ignore


def _centred(node: object) -> tuple[fx.Node, fx.Node | None]:
    """(q, z), if `node` is q - z in wider integers, or q alone."""
    node = scalar(node)  # type: ignore[arg-type]
    if is_call(node, aten.sub.Tensor) and isinstance(node.args[1], fx.Node):
        return scalar(node.args[0]), node.args[1]  # type: ignore[arg-type]
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
