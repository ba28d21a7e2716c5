"""From operators to statements about axes: one walk over the graph, one small rule per family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import fx
from torch.fx.node import Argument

from qcompiler import layout as laid
from qcompiler.layout import in_place
from qcompiler.program import Program, is_tensor, op_name, shape_of
from qcompiler.spaces import semantics as op
from qcompiler.spaces.axes import (
    ALL,
    DIAGONAL,
    MATRIX,
    PERMUTATION,
    SHIFT,
    Absorbed,
    Axes,
    Place,
    Value,
    mentioned,
)
from qcompiler.spaces.rules import fused, layout
from qcompiler.spaces.rules.common import input_of, told_apart, unknown, varying

aten = torch.ops.aten


def walk(program: Program) -> Axes:
    """Terms and statements of the whole program, in one pass over its nodes."""
    axes = Axes(program)
    for node in program.graph.nodes:
        if node.op == "output":
            for value in filter(None, map(axes.of, node.all_input_nodes)):
                axes.mark(node, value, "it is an output of the program")
        elif node.op == "placeholder":
            if program.param_of(node) is not None:
                _weight(axes, node)
            elif is_tensor(node) and node.meta["val"].is_floating_point():
                axes.mark(node, axes.new(node), "it is an input of the program")
        elif is_tensor(node) and 0 in shape_of(node):
            continue  # it holds nothing: a rotary embedding's rest, say
        elif node in axes.program.weights and node not in axes.layouts:
            _weight(axes, node)
        elif is_tensor(node) and node.meta["val"].is_floating_point():
            before = len(axes.statements)
            _rule(axes, node)
            _speak_for_all(axes, node, before)
        else:
            _reader(axes, node)
    return axes


def _rule(axes: Axes, node: fx.Node) -> None:
    target = node.target
    if target in op.PRODUCTS:
        _products(axes, node, op.PRODUCTS[target])
    elif target in op.ELEMENTWISE_PRODUCT | op.ELEMENTWISE_QUOTIENT | op.ELEMENTWISE_SUM:
        _binary(axes, node)
    elif target in laid.PASS | op.HOMOGENEOUS:
        _pass(axes, node)
    elif target in op.BREAK:
        _break(axes, node)
    elif target in op.SOFTMAX:
        _softmax(axes, node)
    elif target in op.NORMS:
        fused.norm(axes, node)
    elif target in laid.RESHAPES:
        layout.reshape(axes, node)
    elif target in laid.PERMUTATIONS:
        layout.permute(axes, node)
    elif target in op.REDUCTIONS:
        _reduce(axes, node)
    elif target in op.CONVOLUTIONS:
        _convolution(axes, node, op.CONVOLUTIONS[target])
    elif target in op.POOLS:
        _pool(axes, node)
    elif target in _SPECIAL:
        _SPECIAL[target](axes, node)
    else:
        unknown(axes, node)


def _weight(axes: Axes, node: fx.Node) -> None:
    """A parameter, or the end of arithmetic on its edge: a map goes behind it, whatever it is.

    Only where a layer reads it as it is; what another weight is computed from stays what it is.
    """
    if is_tensor(node) and node.meta["val"].is_floating_point():
        axes.new(node)
        if in_place(node, axes.program.weights, axes.layouts):
            axes.edges.add(node)


def _speak_for_all(axes: Axes, node: fx.Node, before: int) -> None:
    """An operand that the rule said nothing about (an additive mask, say) lets nothing pass."""
    spoken = {v for s in axes.statements[before:] for v in mentioned(s)}
    for value in filter(None, map(axes.of, node.all_input_nodes)):
        if value not in spoken:
            axes.mark(node, value, f"{op_name(node.target)} reads it as it is")


def _products(axes: Axes, node: fx.Node, summands: tuple[str, ...]) -> None:
    result = axes.new(node)
    told = node.target is aten.linear.default and _shifts(axes, node, result)
    for text in summands:
        left, _, right = text.partition("->")
        parts = [p.strip().partition(":") for p in left.split(",")]
        operands = [input_of(axes, node, int(number)) for number, _, _ in parts]
        if all(operands):
            names = ",".join(letters for _, _, letters in parts)
            axes.product(node, f"{names} -> {right}", operands, result, "told" if told else "stops")  # type: ignore[arg-type]


def _shifts(
    axes: Axes, node: fx.Node, result: Value, channel: int = -1, pads: bool = False
) -> bool:
    """A layer's bias takes shifts of what it makes and of what it reads, if its weight is fixed."""
    x = input_of(axes, node)
    if x is None or any(n in axes.program.activations for n in node.all_input_nodes[1:]):
        return False
    why = f"{op_name(node.target)} passes no shift"
    for value in (x, result):
        axis = channel % len(value.axes)
        axes.mark(node, value, why, [i for i in range(len(value.axes)) if i != axis], SHIFT)
        if value is x and pads:
            axes.mark(node, x, "the zeros that pad it would have to be shifted too", [axis], SHIFT)
        else:
            axes.statements.append(Absorbed(node, Place(value, axis), produces=value is result))
    return True


def _binary(axes: Axes, node: fx.Node) -> None:
    a, b = input_of(axes, node, 0), input_of(axes, node, 1)
    result = axes.new(node)
    if node.target in op.ELEMENTWISE_SUM:
        plain = node.target is aten.add.Tensor and not node.kwargs
        for value in filter(None, (a, b)):
            axes.product(node, "* -> *", [value], result, "adds" if plain else "stops")
        if a is None or (b is None and node.args[1] != 0):
            axes.mark(node, result, "a constant is added", kinds=DIAGONAL | MATRIX)
    elif a is not None and b is not None:
        axes.product(node, "*, * -> *", [a, b], result)
        if node.target in op.ELEMENTWISE_QUOTIENT:
            axes.mark(node, b, "it is a divisor", kinds=ALL - PERMUTATION)
    else:  # times a number, or a mask that carries no channels of its own
        only = a or b
        if only is None:
            axes.mark(node, result, "it has no floating point operand")
        else:
            axes.product(node, "* -> *", [only], result)
            for mask in (n for n in node.all_input_nodes if n is not only.node):
                varied = varying(result, mask)
                axes.mark(node, result, "a mask multiplies it", varied, MATRIX)
            if node.target in op.ELEMENTWISE_QUOTIENT and a is None:
                axes.mark(node, only, "it is a divisor", kinds=ALL - PERMUTATION)
    told_apart(axes, node, result, *node.args)


def _pass(axes: Axes, node: fx.Node) -> None:
    x, result = input_of(axes, node), axes.new(node)
    if x is None:
        axes.mark(node, result, "it is made from integers")
    else:
        if node.target in op.HOMOGENEOUS:
            axes.all_same(node, x, result, DIAGONAL | PERMUTATION)
            _nonlinear(axes, node, x, result)
        elif node.target is aten.neg.default:
            axes.all_same(node, x, result, ALL - SHIFT)
            for value in (x, result):
                axes.mark(node, value, "neg turns a shift around", kinds=SHIFT)
        else:
            axes.all_same(node, x, result)


def _nonlinear(axes: Axes, node: fx.Node, *values: Value) -> None:
    """Factors and other orders pass, matrices and shifts do not."""
    for value in values:
        axes.mark(node, value, f"{op_name(node.target)} is not linear", kinds=MATRIX | SHIFT)


def _break(axes: Axes, node: fx.Node) -> None:
    """A function of each element by itself: only another order of them passes."""
    x, result = input_of(axes, node), axes.new(node)
    why = f"{op_name(node.target)} commutes with no map"
    others = [v for v in map(axes.of, node.all_input_nodes) if v is not None and v is not x]
    orders = PERMUTATION if x is not None and not others else frozenset()
    for value in filter(None, (x, result, *others)):
        axes.mark(node, value, why, kinds=ALL - orders)
    if x is not None and len(x.axes) == len(result.axes):  # still the same indices
        axes.all_same(node, x, result, orders)
    told_apart(axes, node, result, *node.all_input_nodes)


def _softmax(axes: Axes, node: fx.Node) -> None:
    x, result = input_of(axes, node), axes.new(node)
    if x is None:
        return unknown(axes, node)
    for value in (x, result):
        axes.mark(node, value, "softmax commutes with no map", kinds=ALL - PERMUTATION)
    return axes.all_same(node, x, result, PERMUTATION)


def _reduce(axes: Axes, node: fx.Node) -> None:
    x = input_of(axes, node)
    dims = node.args[1] if len(node.args) > 1 else None
    if x is None or dims is None:
        return unknown(axes, node)
    rank = len(x.axes)
    gone = {d % rank for d in dims}  # type: ignore[union-attr,operator]
    keep = bool(node.args[2]) if len(node.args) > 2 else False
    result = axes.new(node)
    names = [f"a{i}" for i in range(rank)]
    out = [f"r{i}" if i in gone else n for i, n in enumerate(names) if keep or i not in gone]
    axes.product(node, f"{' '.join(names)} -> {' '.join(out)}", [x], result)
    return None


def _convolution(axes: Axes, node: fx.Node, spatial: int) -> None:
    x, weight, bias = (input_of(axes, node, i) for i in range(3))
    rest = node.args[3:]
    groups = rest[3] if len(rest) > 3 else 1
    if x is None or weight is None or not isinstance(groups, int):
        return unknown(axes, node)
    result = axes.new(node)
    s, k, y = (" ".join(f"!{c}{i}" for i in range(spatial)) for c in "sky")
    padding = rest[1] if len(rest) > 1 else 0
    pads = padding not in (0, "valid") and padding != [0] * spatial
    told = groups == 1 and _shifts(axes, node, result, channel=1, pads=pads)
    shift: Literal["told", "stops"] = "told" if told else "stops"
    channels = shape_of(node.args[0])[1]  # type: ignore[arg-type]
    if groups == 1:
        axes.product(node, f"b c {s}, o c {k} -> b o {y}", [x, weight], result, shift)
    elif groups == channels == shape_of(node)[1]:  # depthwise: a factor per channel
        axes.product(node, f"b c {s}, c i {k} -> b c {y}", [x, weight], result)
    else:
        for value in (x, weight, result):
            axes.mark(node, value, "a grouped convolution")
    if bias is not None:
        axes.product(node, f"o -> b o {y}", [bias], result, shift)
    return None


def _pool(axes: Axes, node: fx.Node) -> None:
    x = input_of(axes, node)
    if x is None:
        return unknown(axes, node)
    result = axes.new(node)
    spatial = range(len(x.axes) - 2)
    s, y = (" ".join(f"!{c}{i}" for i in spatial) for c in "sy")
    axes.product(node, f"b c {s} -> b c {y}", [x], result)
    if node.target in op.MAX_POOLS:
        _nonlinear(axes, node, x, result)
    return None


def _matmul(axes: Axes, node: fx.Node) -> None:
    a, b = input_of(axes, node, 0), input_of(axes, node, 1)
    if a is None or b is None or len(a.axes) < 2 or len(b.axes) < 2:
        return unknown(axes, node)
    axes.product(node, "* m k, * k n -> * m n", [a, b], axes.new(node))
    return None


def _where(axes: Axes, node: fx.Node) -> None:
    _chosen(axes, node, node.args[0], node.args[1:3])


def _masked_fill(axes: Axes, node: fx.Node) -> None:
    _chosen(axes, node, node.args[1], (node.args[2], node.args[0]))


def _chosen(axes: Axes, node: fx.Node, mask: Argument, choices: Sequence[Argument]) -> None:
    """One of two values in each place. Where the mask does not vary along an axis, maps on it pass.

    A constant takes none, unless it is 0, which stays 0 under all that is linear.
    """
    result = axes.new(node)
    varied = varying(result, mask)
    for choice in choices:
        value = axes.of(choice)
        if value is not None:
            axes.product(node, "* -> *", [value], result)
        elif choice != 0:
            axes.mark(node, result, "a constant is chosen in places", kinds=ALL - PERMUTATION)
    axes.mark(node, result, "it is chosen in places", varied, MATRIX)
    told_apart(axes, node, result, mask, *choices)


def _einsum(axes: Axes, node: fx.Node) -> None:
    """A product says what it is, unless it leaves letters out or takes a diagonal."""
    text, operands = node.args[0].replace(" ", ""), [axes.of(n) for n in node.args[1]]
    left, arrow, right = text.partition("->")
    parts = left.split(",")
    plain = arrow and "." not in text and all(len(set(p)) == len(p) for p in (*parts, right))
    if not plain or not all(operands):
        return unknown(axes, node)
    words = ",".join(" ".join(p) for p in parts)
    return axes.product(node, f"{words} -> {' '.join(right)}", operands, axes.new(node))


def _reader(axes: Axes, node: fx.Node) -> None:
    """A node that makes no floating point tensor: comparisons and such read values as they are.

    Shapes and parts of lists do not depend on the values.
    """
    if node.target in (aten.sym_size.int, aten.sym_numel.default):
        return
    for value in filter(None, map(axes.of, node.all_input_nodes)):
        axes.mark(node, value, f"{op_name(node.target)} reads it")


_SPECIAL = {
    aten.scaled_dot_product_attention.default: fused.attention,
    torch.ops.qc.rope.default: fused.rope,
    aten.slice.Tensor: layout.slice,
    aten.select.int: layout.select,
    aten.cat.default: layout.cat,
    aten.expand.default: layout.expand,
    aten.broadcast_to.default: layout.expand,
    aten.index.Tensor: layout.rows,
    aten.index_select.default: layout.rows,
    aten.repeat_interleave.self_int: layout.rows,
    aten.pad.default: layout.pad,
    aten.matmul.default: _matmul,
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.einsum.default: _einsum,
    aten.roll.default: layout.moved,
    aten.flip.default: layout.moved,
    aten.repeat.default: layout.repeat,
}
