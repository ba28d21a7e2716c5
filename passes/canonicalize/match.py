"""What patterns are made of: numbers, products, and values behind casts."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import fx

from qcompiler.edit import Edit
from qcompiler.passes.canonicalize.tidy import CASTS

aten = torch.ops.aten

MUL = (aten.mul.Tensor, aten.mul.Scalar)
DIV = (aten.div.Tensor, aten.div.Scalar)
ADD = (aten.add.Tensor, aten.add.Scalar)
POW = (aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor)
FACTORS = 8
"""Factors up to which a product is taken apart; no pattern has as many."""
SAME = 1e-10
"""Relative difference up to which two numbers are one."""


def is_call(node: object, *targets: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def operands(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The two tensor operands of a binary call, in both orders (division: as written)."""
    if len(node.args) < 2 or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return []
    a, b = node.args[:2]
    both = [(a, b)] if node.target is aten.div.Tensor else [(a, b), (b, a)]
    return both  # type: ignore[return-value]


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


def as_type(x: fx.Node, like: fx.Node) -> fx.Node | None:
    """`x`, or the value that it was cast from, in the type of `like`."""
    for value in (x, uncast(x)):
        if value.meta["val"].dtype == like.meta["val"].dtype:
            return value
    return None


def number(edit: Edit, value: object) -> float | None:
    """The number that `value` is: as written, filled in, or a parameter of one element."""
    if isinstance(value, int | float):
        return float(value)
    if is_call(value, aten.full.default, aten.scalar_tensor.default):
        assert isinstance(value, fx.Node)
        fill = value.args[-1]
        one = value.meta["val"].ndim == 0
        return float(fill) if one and isinstance(fill, int | float) else None
    if edit.param_of(value) is None or value.meta["val"].ndim > 1:  # type: ignore[attr-defined]
        return None
    tensor = edit.tensor(value)  # type: ignore[arg-type]
    return float(tensor) if tensor.numel() == 1 else None


def is_number(edit: Edit, value: object, expected: float) -> bool:
    found = number(edit, value)
    return found is not None and math.isclose(found, expected, rel_tol=SAME)


def with_number(edit: Edit, node: object, *targets: object) -> tuple[fx.Node, float] | None:
    """(x, c), if `node` is the sum or product x + c, c · x of one of `targets`."""
    if not is_call(node, *targets) or node.kwargs or len(node.args) != 2:  # type: ignore[attr-defined]
        return None
    a, b = node.args  # type: ignore[attr-defined]
    for x, c in ((a, b), (b, a)):
        found = number(edit, c)
        if found is not None and isinstance(x, fx.Node):
            return x, found
    return None


def unscaled(edit: Edit, node: fx.Node, whole: Collection[fx.Node] = ()) -> tuple[float, fx.Node]:
    """(c, x) with `node` = c · x, without factors that are numbers; stops at a value in `whole`."""
    scale = 1.0
    while node not in whole:
        if (found := with_number(edit, node, *MUL)) is not None:
            node, c = found
            scale *= c
        elif is_call(node, *DIV) and (divisor := number(edit, node.args[1])):
            scale /= divisor
            node = node.args[0]  # type: ignore[assignment]
        else:
            break
    return scale, node


def factors(
    edit: Edit, node: fx.Node, whole: Collection[fx.Node] = ()
) -> tuple[float, list[fx.Node]]:
    """(c, [a, b, …]) with `node` = c · a · b · …; the values in `whole` are not taken apart."""
    found: list[fx.Node] = []
    scale, waiting = 1.0, [node]
    while waiting:
        c, current = unscaled(edit, waiting.pop(), whole)
        scale *= c
        power = whole_power(edit, current)
        if current in whole or len(found) + len(waiting) >= FACTORS:
            found.append(current)
        elif is_call(current, aten.mul.Tensor):
            waiting += current.args[:2]  # type: ignore[arg-type]
        elif power is not None:
            waiting += [current.args[0]] * power  # type: ignore[list-item]
        else:
            found.append(current)
    return scale, found


def whole_power(edit: Edit, node: object) -> int | None:
    """2 or 3, if `node` is a square or a cube by its exponent."""
    if not is_call(node, *POW):
        return None
    exponent = number(edit, node.args[1])  # type: ignore[attr-defined]
    return int(exponent) if exponent in (2.0, 3.0) else None


def is_product(edit: Edit, node: fx.Node, scale: float, *parts: fx.Node) -> bool:
    """Whether `node` = scale · parts[0] · parts[1] · …"""
    c, found = factors(edit, node, set(parts))
    same = sorted(n.name for n in found) == sorted(n.name for n in parts)
    return same and math.isclose(c, scale, rel_tol=SAME)
