"""Quantized operators of the standard, as `qc::` operators and plain arithmetic between them.

An integer operator such as QLinearMatMul is what it stands for: dequantize, compute, quantize. The
passes then read one form, whoever quantized the file.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.capture.onnx.call import Call
from qcompiler.capture.onnx.ops.cast import cast_to
from qcompiler.capture.onnx.ops.convolution import convolve
from qcompiler.capture.onnx.table import MICROSOFT, op
from qcompiler.capture.onnx.types import torch_dtype
from qcompiler.formats import QFormat

D = ir.DataType
ELEMENTS = {
    D.INT8: "int8", D.UINT8: "uint8", D.INT4: "int4", D.UINT4: "uint4", D.INT2: "int2",
    D.UINT2: "uint2",
}  # fmt: skip
"""Types that are formats of ours; others (16 bits, narrow floats) become plain arithmetic."""
qc = torch.ops.qc


@op("QuantizeLinear")
def quantize_linear(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """saturate(round(x / scale) + zero) in the type of the zero point."""
    given = call.int("output_dtype", 0)
    type = call.type(2) if call.given(2) else D(given) if given else D.UINT8
    return quantize(call, x, 1, 2, type, call.int("axis", 1), call.int("block_size", 0))


@op("DequantizeLinear")
def dequantize_linear(call: Call) -> Tensor:
    """(q - zero) * scale in the type of the scale."""
    given = call.int("output_dtype", 0)
    y = dequantize(call, 0, 1, 2, call.int("axis", 1), call.int("block_size", 0))
    return y.to(torch_dtype(D(given))) if given else y


op("QuantizeLinear", domain=MICROSOFT)(quantize_linear)
op("DequantizeLinear", domain=MICROSOFT)(dequantize_linear)


def quantize(
    call: Call, x: Tensor, scale: int, zero: int, type: ir.DataType, axis: int = 0, block: int = 0
) -> Tensor:
    """`x` as numbers of `type`; `scale` and `zero` are positions of inputs of the node."""
    s, z = _scale(call, scale), call.tensor(zero) if call.given(zero) else None
    if type in ELEMENTS:
        text = _format(call, type, x.ndim, s, zero, axis, block)
        spread = _arranged(s, x.ndim, axis, block)
        zeros = None if ":asym" not in text else _zeros(z, s, x.ndim, axis, block)
        result: Tensor = qc.quantize(x, text, spread.float(), zeros, torch_dtype(type))
        return result
    scaled = x / _spread(s.to(x.dtype), x, axis, block)
    if not type.is_integer():
        return cast_to(scaled, type, saturate=bool(call.int("saturate", 1)))
    bounds = torch.iinfo(torch_dtype(type))
    q = torch.round(scaled.float())
    if z is not None:
        q = q + _spread(z, x, axis, block).float()
    return q.clamp(bounds.min, bounds.max).to(torch.int32).to(torch_dtype(type))


def dequantize(
    call: Call, data: int, scale: int, zero: int, axis: int = 0, block: int = 0
) -> Tensor:
    """The input at `data` as floating point numbers of the type of its scale."""
    q, s = call.tensor(data), _scale(call, scale)
    z = call.tensor(zero) if call.given(zero) else None
    type = call.type(data)
    if type in ELEMENTS:
        text = _format(call, type, q.ndim, s, zero, axis, block)
        zeros = None if ":asym" not in text else _zeros(z, s, q.ndim, axis, block)
        spread = _arranged(s, q.ndim, axis, block)
        result: Tensor = qc.dequantize_integers(q, text, spread.float(), zeros, s.dtype)
        return result
    value = q.float()
    if z is not None:
        value = value - _spread(z, q, axis, block).float()
    return (value * _spread(s, q, axis, block).float()).to(s.dtype)


def _scale(call: Call, index: int) -> Tensor:
    """The scale. Quantizers write infinite ones for values with -inf in them, such as masks."""
    known = call.value(index).known
    if known is not None and not np.isfinite(known.astype(np.float64)).all():
        raise call.refusal(
            "its scale is not finite, so that all it yields is NaN; quantize the model again "
            "without this node"
        )
    return call.tensor(index)


def _format(
    call: Call, type: ir.DataType, rank: int, scale: Tensor, zero: int, axis: int, block: int
) -> str:
    """The format of a tensor of `rank`: one scale, one for each index of `axis`, or for blocks."""
    known = call.value(zero).known if call.given(zero) else None
    symmetric = not call.given(zero) or (known is not None and not known.any())
    symmetric = symmetric and ELEMENTS[type].startswith("int")
    if scale.numel() == 1 and not block:
        blocks: tuple[int, ...] | None = None
    else:
        axis %= max(rank, 1)
        inner = (-1 if not block else 1,)
        before = inner * axis if block or axis else ()
        blocks = (*before, block or 1, *inner * (rank - axis - 1))
        if not block and axis == 0:
            blocks = blocks[1:] or (1,)
    return str(QFormat(ELEMENTS[type], blocks, symmetric, full=symmetric))


def _arranged(scale: Tensor, rank: int, axis: int, block: int) -> Tensor:
    """A scale (or zero point) with an axis for each axis of the tensor."""
    if block:
        return scale
    if scale.numel() == 1:
        return scale.reshape([1] * rank)
    shape = [1] * rank
    shape[axis] = scale.shape[0]
    return scale.reshape(shape)


def _zeros(zero: Tensor | None, scale: Tensor, rank: int, axis: int, block: int) -> Tensor:
    if zero is None:
        return torch.zeros_like(_arranged(scale, rank, axis, block), dtype=torch.int16)
    return _arranged(zero, rank, axis, block).to(torch.int16)


def _spread(scale: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """A scale that broadcasts against `x`."""
    arranged = _arranged(scale, x.ndim, axis, block)
    if not block:
        return arranged
    return arranged.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])


@op("DynamicQuantizeLinear")
def dynamic_quantize_linear(call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 with the range of x and of zero."""
    text = "uint8:tensor:asym:dynamic"
    scale, zero = qc.dynamic_scale(x, text)
    q = qc.quantize(x, text, scale, zero, torch.uint8)
    return q, scale.reshape([]), zero.reshape([]).to(torch.uint8)


@op("MatMulInteger")
def matmul_integer(
    call: Call, a: Tensor, b: Tensor, a_zero: Tensor | None, b_zero: Tensor | None
) -> Tensor:
    """(A - za) (B - zb) in int32; za has one number for each row, zb for each column."""
    if a_zero is not None and a_zero.ndim:
        a_zero = a_zero.unsqueeze(-1) if a_zero.numel() > 1 else a_zero
    return torch.matmul(_centred(a, a_zero), _centred(b, b_zero))


@op("ConvInteger")
def conv_integer(
    call: Call, x: Tensor, w: Tensor, x_zero: Tensor | None, w_zero: Tensor | None
) -> Tensor:
    """torch convolves no integers; in float64 their sums are exact."""
    if w_zero is not None and w_zero.numel() > 1:
        w_zero = w_zero.reshape([-1] + [1] * (w.ndim - 1))
    y = convolve(call, _centred(x, x_zero).double(), _centred(w, w_zero).double(), None)
    return y.to(torch.int32)


def _centred(x: Tensor, zero: Tensor | None) -> Tensor:
    x = x.to(torch.int32)
    return x if zero is None else x - zero.to(torch.int32)


@op("QLinearMatMul")
def qlinear_matmul(call: Call) -> Tensor:
    a = dequantize(call, 0, 1, 2, -2)
    b = dequantize(call, 3, 4, 5, -1)
    return requantized(call, a @ b, 6, 7)


@op("QLinearConv")
def qlinear_conv(call: Call) -> Tensor:
    x, w = dequantize(call, 0, 1, 2), dequantize(call, 3, 4, 5)
    bias = None
    if call.given(8):
        bias = call.tensor(8).float() * (call.tensor(1) * call.tensor(4)).float()
    return requantized(call, convolve(call, x, w, bias), 6, 7)


def requantized(call: Call, y: Tensor, scale: int, zero: int) -> Tensor:
    """`y` rounded as the inputs of the node at `scale` and `zero` say."""
    return quantize(call, y, scale, zero, call.type(zero) if call.given(zero) else D.UINT8)
