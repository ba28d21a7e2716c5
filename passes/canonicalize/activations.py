"""Activation functions that a source spelled out.

gelu(x)      = x/2 · (1 + erf(x / √2))                       (Hendrycks & Gimpel 2016, section 2)
gelu_tanh(x) = x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))
silu(x)      = x · sigmoid(x)
hardswish(x) = x/6 · clamp(x + 3, 0, 6)                      (Howard et al. 2019, section 5.2)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import fx

from qcompiler.edit import Edit, Target
from qcompiler.passes.canonicalize.match import (
    ADD,
    DIV,
    MUL,
    factors,
    is_call,
    is_number,
    is_product,
    with_number,
)
from qcompiler.program import op_name

aten = torch.ops.aten

Fits = Callable[[Edit, fx.Node, fx.Node], bool]
BETA = math.sqrt(2 / math.pi)
KAPPA = 0.044715
NEAR = 16
"""Values that are tried as the x of a formula."""


def raise_silu(edit: Edit) -> None:
    """x · sigmoid(x)."""
    for node in edit.calls(aten.mul.Tensor):
        for x, gate in zip(node.args[:2], node.args[1::-1], strict=True):
            if is_call(gate, aten.sigmoid.default) and gate.args[0] is x:  # type: ignore[union-attr]
                _raise(edit, node, aten.silu.default, x)  # type: ignore[arg-type]
                break


def raise_gelu(edit: Edit) -> None:
    """Both formulas above, in whatever order their factors are multiplied."""
    for node in edit.calls(*MUL, *DIV):
        for target, fits in GELUS.items():
            x = _gelu_of(edit, node, target, fits)
            if x is not None:
                exact = target is aten.erf.default
                options = {} if exact else {"approximate": "tanh"}
                _raise(edit, node, aten.gelu.default, x, **options)
                break


def _gelu_of(edit: Edit, node: fx.Node, target: Target, fits: Fits) -> fx.Node | None:
    """x, if `node` is x/2 (1 + f(u)) with f = `target` and a u that `fits` x."""
    for gate in factors(edit, node)[1]:
        curve = _one_plus(edit, gate)
        if curve is None or not is_call(curve, target):
            continue
        u = curve.args[0]
        assert isinstance(u, fx.Node)
        for x in _inside(u):
            if is_product(edit, node, 0.5, x, gate) and fits(edit, u, x):
                return x
    return None


def raise_hardswish(edit: Edit) -> None:
    """The formula above, also with hardsigmoid(x) = clamp(x/6 + 1/2, 0, 1)."""
    for node in edit.calls(*MUL, *DIV):
        x = _hardswish_of(edit, node)
        if x is not None:
            _raise(edit, node, aten.hardswish.default, x)


def _hardswish_of(edit: Edit, node: fx.Node) -> fx.Node | None:
    for gate in factors(edit, node)[1]:
        height = _height(gate)
        if height is None:
            continue
        for x in _inside(gate):
            if is_product(edit, node, 1 / height, x, gate) and _is_ramp(edit, gate, x, height):
                return x
    return None


def _raise(edit: Edit, node: fx.Node, target: Target, x: fx.Node, **options: str) -> None:
    if x.meta["val"].dtype == node.meta["val"].dtype:
        edit.spend(f"this is {op_name(target)}", node)
        edit.replace(node, edit.call(target, x, like=node, replaces=[node], **options))


def _one_plus(edit: Edit, node: fx.Node) -> fx.Node | None:
    """x, if `node` is 1 + x."""
    found = with_number(edit, node, *ADD)
    return found[0] if found is not None and found[1] == 1 else None


def _inside(node: fx.Node) -> Iterator[fx.Node]:
    """`node` and the values nearest behind it."""
    found = [node]
    for current in found:
        if current.op == "call_function" and len(found) < NEAR:
            found += [n for n in current.all_input_nodes if n not in found]
    return iter(found)


def _is_erf_argument(edit: Edit, u: fx.Node, x: fx.Node) -> bool:
    """u = x / √2"""
    return is_product(edit, u, math.sqrt(0.5), x)


def _is_tanh_argument(edit: Edit, u: fx.Node, x: fx.Node) -> bool:
    """u = √(2/π) (x + 0.044715 x³), or with x taken out of the sum."""
    for part in factors(edit, u, {x})[1]:
        if not is_call(part, *ADD):
            continue
        if is_product(edit, u, BETA, part):
            a, b = part.args[:2]
            return (a is x and is_product(edit, b, KAPPA, x, x, x)) or (  # type: ignore[arg-type]
                b is x and is_product(edit, a, KAPPA, x, x, x)  # type: ignore[arg-type]
            )
        square = _one_plus(edit, part)
        if square is not None and is_product(edit, u, BETA, x, part):
            return is_product(edit, square, KAPPA, x, x)
    return False


GELUS: dict[Target, Fits] = {
    aten.erf.default: _is_erf_argument,
    aten.tanh.default: _is_tanh_argument,
}


def _height(gate: fx.Node) -> int | None:
    """The upper end of a clamp to [0, 1] or [0, 6]."""
    if is_call(gate, aten.hardsigmoid.default):
        return 1
    if is_call(gate, aten.relu6.default):
        return 6
    if not is_call(gate, aten.clamp.default, aten.hardtanh.default) or len(gate.args) < 3:
        return None
    low, high = gate.args[1:3]
    return int(high) if low == 0 and high in (1, 6) else None  # type: ignore[arg-type]


def _is_ramp(edit: Edit, gate: fx.Node, x: fx.Node, height: int) -> bool:
    """Whether `gate` = clamp(height · (x/6 + 1/2), 0, height)."""
    if gate.args[0] is x:
        return is_call(gate, aten.hardsigmoid.default)
    found = with_number(edit, gate.args[0], *ADD)
    if found is None or not is_number(edit, found[1], height / 2):
        return False
    return is_product(edit, found[0], height / 6, x)
