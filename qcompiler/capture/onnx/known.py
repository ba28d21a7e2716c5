"""Arithmetic on known values: NumPy on small arrays of numbers and symbolic sizes.

An array of type `object` holds Python numbers and symbolic sizes; the same functions serve it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qcompiler.capture.onnx.call import FOLDED, Array, Call

Fold = Callable[..., Array | tuple[Array, ...] | None]
FOLDS: dict[str, Fold] = {}
"""Operator → function of (call, arrays); None means that it is left to torch after all."""


def fold(*names: str) -> Callable[[Fold], Fold]:
    def register(function: Fold) -> Fold:
        for name in names:
            FOLDS[name] = function
        return function

    return register


def array(values: object) -> Array:
    """Numbers as an int64 array, or as objects if some are symbolic."""
    found = np.array(values, dtype=object)
    if any(not isinstance(v, int) for v in found.reshape(-1)):
        return found
    return found.astype(np.int64)


def each(function: Callable[..., object]) -> Callable[..., Array]:
    """`function` on each element, broadcast; plain numbers again when nothing is symbolic."""
    lifted = np.frompyfunc(function, function.__code__.co_argcount, 1)

    def apply(*arrays: Array) -> Array:
        dtype = np.result_type(*arrays)
        result = np.asarray(lifted(*map(_numbers, arrays)), dtype=object)
        plain = not any(_symbolic(v) for v in result.reshape(-1))
        if not plain or dtype.kind == "O":
            return result if not plain else array(result) if _integers(result) else result
        kind = np.bool_ if all(isinstance(v, bool) for v in result.reshape(-1)) else dtype
        return result.astype(kind)

    return apply


def _numbers(values: Array) -> Array:
    """As Python numbers. Of a float32 the shortest decimal that it is: 0.7 · 10 is 7 there, and
    0.699999988 · 10 in double precision is not."""
    if values.dtype == np.float32:
        return np.array([float(str(v)) for v in values.reshape(-1)], object).reshape(values.shape)
    return values.astype(object)


def _symbolic(value: object) -> bool:
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def _integers(values: Array) -> bool:
    return all(isinstance(v, int) for v in values.reshape(-1))


def _divide(a: object, b: object) -> object:
    """ONNX divides integers towards zero."""
    if isinstance(a, int) and isinstance(b, int):
        return -(-a // b) if (a < 0) != (b < 0) else a // b
    if not (isinstance(a, int | torch.SymInt) and isinstance(b, int | torch.SymInt)):
        return operator.truediv(a, b)
    if statically_known_true(operator.ge(a, 0)):
        return operator.floordiv(a, b)
    below = operator.neg(operator.floordiv(operator.neg(a), b))
    return torch.sym_ite(operator.ge(a, 0), operator.floordiv(a, b), below)


def _root(a: object) -> object:
    return torch.sym_sqrt(a) if _symbolic(a) else math.sqrt(a)  # type: ignore[arg-type]


_ELEMENTWISE: dict[str, Callable[..., object]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _divide,
    "Neg": lambda a: -a,
    "Abs": lambda a: abs(a),
    "Floor": lambda a: math.floor(a),
    "Ceil": lambda a: math.ceil(a),
    "Sqrt": _root,
    "Equal": lambda a, b: a == b,
    "Greater": lambda a, b: a > b,
    "Less": lambda a, b: a < b,
    "GreaterOrEqual": lambda a, b: a >= b,
    "LessOrEqual": lambda a, b: a <= b,
    "Not": lambda a: not a,
    "And": lambda a, b: a and b,
    "Or": lambda a, b: a or b,
    "Where": lambda c, a, b: a if c else b,
}


def _elementwise(function: Callable[..., object]) -> Fold:
    apply = each(function)
    return lambda call, *arrays: apply(*arrays)


FOLDS.update({name: _elementwise(function) for name, function in _ELEMENTWISE.items()})


@fold("Min", "Max")
def _extreme(call: Call, *arrays: Array) -> Array:
    name = call.node.op_type
    pick = each(
        (lambda a, b: torch.sym_min(a, b) if _symbolic(a) or _symbolic(b) else min(a, b))
        if name == "Min"
        else (lambda a, b: torch.sym_max(a, b) if _symbolic(a) or _symbolic(b) else max(a, b))
    )
    result = arrays[0]
    for other in arrays[1:]:
        result = pick(result, other)
    return result


@fold("Mod")
def _mod(call: Call, a: Array, b: Array) -> Array | None:
    """With fmod the sign is that of the dividend, which for sizes is the same."""
    plain = a.dtype != object and b.dtype != object
    if call.int("fmod", 0):
        return np.fmod(a, b) if plain else None
    return each(lambda x, y: x % y)(a, b)


@fold("Identity")
def _identity(call: Call, a: Array) -> Array:
    return a


@fold("Cast")
def _cast(call: Call, a: Array) -> Array | None:
    """Integers to integers, and sizes to floating point numbers and back."""
    to = ir.DataType(call.int("to"))
    if to in (ir.DataType.INT64, ir.DataType.INT32):
        if a.dtype == object:
            return each(lambda v: v if isinstance(v, int | torch.SymInt) else math.floor(v))(a)
        return a.astype(to.numpy()) if a.dtype.kind in "iufb" else None
    if to in (ir.DataType.FLOAT, ir.DataType.DOUBLE) and a.size == 1:
        return each(lambda v: torch.sym_float(v))(a) if a.dtype == object else a.astype(to.numpy())
    if to is ir.DataType.BOOL and a.dtype != object:
        return a.astype(np.bool_)
    return None


@fold("Gather")
def _gather(call: Call, data: Array, indices: Array) -> Array | None:
    if indices.dtype == object or data.ndim == 0:
        return None
    axis = call.int("axis", 0)
    size = data.shape[axis]
    if ((indices < -size) | (indices >= size)).any():
        raise call.refusal(f"index {indices.tolist()} into {size} elements")
    return np.take(data, indices, axis)


@fold("Concat")
def _concat(call: Call, *parts: Array) -> Array:
    joined = np.concatenate(parts, call.int("axis"))
    return array(joined) if joined.dtype == object else joined


@fold("Unsqueeze", "Squeeze")
def _squeeze(call: Call, a: Array, axes: Array | None = None) -> Array:
    found = call.ints("axes", []) if axes is None else [int(v) for v in axes.reshape(-1)]
    if call.node.op_type == "Unsqueeze":
        return np.expand_dims(a, tuple(found))
    return np.squeeze(a, tuple(found) or None)


@fold("Reshape")
def _reshape(call: Call, a: Array, shape: Array) -> Array | None:
    if shape.dtype == object:
        return None
    wanted = [a.shape[i] if v == 0 and not call.int("allowzero", 0) else int(v)
              for i, v in enumerate(shape)]  # fmt: skip
    return a.reshape(wanted)


@fold("Slice")
def _slice(call: Call, a: Array, *bounds: Array) -> Array | None:
    if any(b.dtype == object for b in bounds):
        return None
    read = [[int(v) for v in b.reshape(-1)] for b in bounds]
    starts, ends = read[:2] if read else (call.ints("starts"), call.ints("ends"))
    axes = read[2] if len(read) > 2 else call.ints("axes", range(len(starts)))
    steps = read[3] if len(read) > 3 else [1] * len(starts)
    where = [slice(None)] * a.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        back = step < 0 and end < -a.shape[axis]
        where[axis] = slice(start, None if back else end, step)
    return a[tuple(where)]


@fold("ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin")
def _reduce(call: Call, a: Array, axes: Array | None = None) -> Array | None:
    given = call.ints("axes", []) if axes is None else [int(v) for v in axes.reshape(-1)]
    if not given and call.int("noop_with_empty_axes", 0):
        return a
    pick = {"ReduceProd": operator.mul, "ReduceSum": operator.add}.get(call.node.op_type)
    if pick is None:
        if a.dtype == object:
            return None
        pick = max if call.node.op_type == "ReduceMax" else min
    if a.ndim != 1 or not a.size:
        return None
    total = a[0]
    for v in a[1:]:
        total = pick(total, v)
    return array([total] if call.int("keepdims", 1) else total)


@fold("Range")
def _range(call: Call, start: Array, limit: Array, delta: Array) -> Array | None:
    bounds = [v.reshape(-1)[0] for v in (start, limit, delta)]
    if any(v.dtype == object for v in (start, limit, delta)) or start.dtype.kind != "i":
        return None
    if not bounds[2] or abs((bounds[1] - bounds[0]) / bounds[2]) > FOLDED:
        return None
    return np.arange(*bounds, dtype=start.dtype)


@fold("ConstantOfShape")
def _constant(call: Call, shape: Array) -> Array | None:
    if shape.dtype == object or np.prod(shape) > FOLDED:
        return None
    value = call.get("value")
    number = value.numpy().reshape(-1)[0] if value is not None else np.float32(0)  # type: ignore
    return np.full([int(v) for v in shape], number)


@fold("Expand", "Tile")
def _expand(call: Call, a: Array, shape: Array) -> Array | None:
    wanted = None if shape.dtype == object else [int(v) for v in shape.reshape(-1)]
    if wanted is None or a.size * np.prod(wanted, dtype=object) > FOLDED:
        return None
    if call.node.op_type == "Tile":
        return np.tile(a, wanted)
    return np.broadcast_to(a, np.broadcast_shapes(a.shape, tuple(wanted)))


@fold("Transpose")
def _transpose(call: Call, a: Array) -> Array:
    return a.transpose(call.ints("perm", range(a.ndim)[::-1]))


@fold("Split")
def _split(call: Call, a: Array, sizes: Array | None = None) -> tuple[Array, ...] | None:
    axis, count = call.int("axis", 0), len(call.node.outputs)
    given = call.ints("split", []) if sizes is None else [int(v) for v in sizes.reshape(-1)]
    if not given:
        step = -(-a.shape[axis] // call.int("num_outputs", count))
        given = [step] * (count - 1) + [a.shape[axis] - step * (count - 1)]
    return tuple(np.split(a, np.cumsum(given)[:-1], axis))
