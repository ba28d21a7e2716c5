"""Tensors made from sizes and numbers, and what is done by position."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.capture.onnx.call import Call
from qcompiler.capture.onnx.ops.cast import cast_to
from qcompiler.capture.onnx.table import op
from qcompiler.capture.onnx.types import to_tensor

D = ir.DataType


@op("Range")
def range_(call: Call) -> Tensor:
    """From known bounds. Their numbers are Python's, so that the type says which ones it holds."""
    bounds = [call.number(i) for i in range(3)]
    type = call.type(0)
    dtype = torch.float64 if type is D.DOUBLE else None
    return cast_to(torch.arange(*bounds, dtype=dtype), type)


@op("ConstantOfShape")
def constant_of_shape(call: Call) -> Tensor:
    stored = call.get("value")
    value = torch.zeros(1) if stored is None else to_tensor(stored.numpy())  # type: ignore
    return torch.full(call.sizes(0), value.reshape(-1)[0].item(), dtype=value.dtype)


@op("EyeLike")
def eye_like(call: Call, x: Tensor) -> Tensor:
    dtype, k = call.dtype("dtype", x.dtype), call.int("k", 0)
    rows, columns = torch.arange(x.shape[0]).unsqueeze(1), torch.arange(x.shape[1])
    return (columns - rows == k).to(dtype)


@op("ReverseSequence")
def reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    """The first `lengths[b]` steps of each sequence in reverse, the rest as it is."""
    time, batch = call.int("time_axis", 0), call.int("batch_axis", 1)
    shape = [1] * x.ndim
    shape[time] = -1
    steps = torch.arange(x.shape[time]).reshape(shape)
    shape = [1] * x.ndim
    shape[batch] = -1
    ends = lengths.reshape(shape)
    places = torch.where(steps < ends, ends - 1 - steps, steps)
    return torch.gather(x, time, places.expand(x.shape))


@op("TensorScatter")
def tensor_scatter(call: Call, past: Tensor, update: Tensor, start: Tensor | None) -> Tensor:
    """`update` written into `past` along `axis`, from `start[b]` on; a ring in circular mode."""
    axis = call.int("axis", -2) % past.ndim
    size, length = past.shape[axis], update.shape[axis]
    shape = [1] * past.ndim
    shape[axis] = -1
    steps = torch.arange(length).reshape(shape)
    if start is not None:
        steps = steps + start.reshape([-1] + [1] * (past.ndim - 1))
    if call.text("mode", "linear") == "circular":
        steps = steps % size
    return torch.scatter(past, axis, steps.expand(update.shape), update)


@op("Constant")
def constant(call: Call) -> Tensor:
    """One that is an output itself; all others became initializers when the file was read."""
    stored = call.get("value")
    if stored is None:
        raise call.refusal("a constant output that is no tensor; expected the attribute 'value'")
    return to_tensor(stored.numpy())  # type: ignore
