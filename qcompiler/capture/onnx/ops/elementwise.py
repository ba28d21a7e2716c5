"""Arithmetic, comparison and logic, element by element."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcompiler.capture.onnx.call import Call
from qcompiler.capture.onnx.table import Function, op
from qcompiler.capture.onnx.types import torch_dtype

Operand = Tensor | float | int


def both(call: Call) -> tuple[Operand, Operand]:
    """The two operands; one of them as a number where the file has a constant one."""
    first, second = call.value(0), call.value(1)
    if second.size == 1 and first.known is None:
        return first.tensor, call.operand(1, first.tensor.ndim)
    if first.size == 1 and second.known is None:
        return call.operand(0, second.tensor.ndim), second.tensor
    return first.tensor, second.tensor


def _divide(a: Operand, b: Operand) -> Operand:
    """ONNX divides integers towards zero."""
    whole = not any(isinstance(x, Tensor) and x.is_floating_point() for x in (a, b))
    if not whole:
        return a / b
    divide: Callable[..., Tensor] = torch.div
    return divide(a, b, rounding_mode="trunc")


BINARY: dict[str, Callable[[Operand, Operand], object]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _divide,
    "Equal": lambda a, b: a == b,
    "Greater": lambda a, b: a > b,
    "Less": lambda a, b: a < b,
    "GreaterOrEqual": lambda a, b: a >= b,
    "LessOrEqual": lambda a, b: a <= b,
}
TENSORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
}
WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
"""Types in which torch has hardly any arithmetic → one that holds all their numbers."""


def _binary(function: Callable[[Operand, Operand], object]) -> Function:
    def run(call: Call) -> Tensor:
        a, b = both(call)
        kind = next((x.dtype for x in (a, b) if isinstance(x, Tensor)), None)
        if kind in WIDER:
            a, b = (x.to(WIDER[kind]) if isinstance(x, Tensor) else x for x in (a, b))
        result = function(a, b)
        assert isinstance(result, Tensor)
        return result.to(kind) if kind in WIDER and result.dtype != torch.bool else result

    return run


def _pair(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
    def run(call: Call, a: Tensor, b: Tensor) -> Tensor:
        return _widened(function, a, b)

    return run


def _unary(function: Callable[[Tensor], Tensor]) -> Function:
    def run(call: Call, x: Tensor) -> Tensor:
        return _widened(function, x)

    return run


def _widened(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    kind = tensors[0].dtype
    if kind not in WIDER:
        return function(*tensors)
    return function(*(t.to(WIDER[kind]) for t in tensors)).to(kind)


for _name, _f in BINARY.items():
    op(_name)(_binary(_f))
for _name, _g in TENSORS.items():
    op(_name)(_pair(_g))
for _name, _h in UNARY.items():
    op(_name)(_unary(_h))


@op("Pow")
def power(call: Call) -> Tensor:
    """In the type of the base, whatever that of the exponent."""
    raise_to: Callable[..., Tensor] = torch.pow
    result = raise_to(*both(call))
    dtype = torch_dtype(call.type(0))
    return result if result.dtype == dtype else result.to(dtype)


@op("Mod")
def mod(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """With fmod the sign of the dividend, else that of the divisor."""
    function = torch.fmod if call.int("fmod", 0) else torch.remainder
    return _widened(function, a, b) if a.dtype != torch.uint64 else _mod64(a, b)


def _mod64(a: Tensor, b: Tensor) -> Tensor:
    return torch.remainder(a.to(torch.int64), b.to(torch.int64)).to(torch.uint64)


@op("BitShift")
def bit_shift(call: Call, x: Tensor, by: Tensor) -> Tensor:
    left = call.text("direction") == "LEFT"
    wide, steps = x.to(torch.int64), by.to(torch.int64)
    if not left:  # unsigned: no sign is shifted in
        if x.dtype == torch.uint64:
            mask = torch.bitwise_not(torch.full_like(wide, -1) << (64 - steps))
            return ((wide >> steps) & torch.where(steps == 0, -1, mask)).to(x.dtype)
        return (wide >> steps).to(x.dtype)
    return (wide << steps).to(x.dtype)


@op("Where")
def where(call: Call, condition: Tensor) -> Tensor:
    a, b = call.value(1), call.value(2)
    rank = condition.ndim
    if b.size == 1 and a.known is None:
        y, kind = call.operand(2, max(rank, a.tensor.ndim)), a.tensor.dtype
        return torch.where(condition, a.tensor, y) if _same(y, kind) else torch.where(
            condition, a.tensor, b.tensor
        )  # fmt: skip
    return torch.where(condition, a.tensor, b.tensor)


def _same(y: Operand, kind: torch.dtype) -> bool:
    """Whether a Python number leaves the type of the other operand as it is."""
    return isinstance(y, Tensor) or isinstance(y, float) == kind.is_floating_point


@op("Min", "Max")
def extreme(call: Call, *parts: Tensor) -> Tensor:
    function = torch.minimum if call.node.op_type == "Min" else torch.maximum
    result = parts[0]
    for part in parts[1:]:
        result = _widened(function, result, part)
    return result


@op("Sum", "Mean")
def total(call: Call, *parts: Tensor) -> Tensor:
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result / len(parts) if call.node.op_type == "Mean" else result


@op("Clip")
def clip(call: Call, x: Tensor) -> Tensor:
    low, high = (_bound(call, *which, x.ndim) for which in ((1, "min"), (2, "max")))
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        # NaN goes through; where the bounds cross, the upper one holds, as in torch.
        return x if low is None and high is None else torch.clamp(x, low, high)
    if low is not None:
        x = torch.maximum(x, low) if isinstance(low, Tensor) else torch.clamp(x, min=low)
    if high is not None:
        x = torch.minimum(x, high) if isinstance(high, Tensor) else torch.clamp(x, max=high)
    return x


def _bound(call: Call, index: int, name: str, rank: int) -> Operand | None:
    """An input; before version 11 an attribute."""
    if call.version < 11:
        return call.float(name) if call.has(name) else None
    return call.operand(index, rank) if call.given(index) else None


@op("IsInf")
def is_inf(call: Call, x: Tensor) -> Tensor:
    up, down = call.int("detect_positive", 1), call.int("detect_negative", 1)
    if up and down:
        return torch.isinf(x)
    if not up and not down:
        return torch.zeros_like(x, dtype=torch.bool)
    return torch.isposinf(x) if up else torch.isneginf(x)


@op("BitCast")
def bit_cast(call: Call, x: Tensor) -> Tensor:
    return x.view(call.dtype("to"))


@op("Det")
def determinant(call: Call, x: Tensor) -> Tensor:
    result: Tensor = torch.linalg.det(x)
    return result
