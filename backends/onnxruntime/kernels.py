"""The quantized kernels of ONNX Runtime as functions of torch tensors.

They are called while a program is traced for export. What ONNX alone can say becomes a symbolic
operator (it has a shape and no arithmetic), the rest is plain torch.

Activations are quantized to *uint8*: a signed q becomes q + 128 with zero point 128. The numbers
are the same, but on x86 a product of uint8 and int8 is ten times faster than one of int8 and int8.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

Planes = Sequence[tuple[Tensor, Tensor, Tensor | None]]


def _onnx(
    op: str,
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    shape: Sequence[int | torch.SymInt],
    **attributes: int,
) -> Tensor:
    version = 1 if op.startswith("com.microsoft::") else None
    return torch.onnx.ops.symbolic(
        op, inputs, {**attributes}, dtype=dtype, shape=tuple(shape), version=version
    )


def dequantize_linear(q: Tensor, scale: Tensor, zero: Tensor, axis: int = 0) -> Tensor:
    """(q - zero) * scale in float32; one scale for all, or one for each index of `axis`."""
    return _onnx("DequantizeLinear", (q, scale, zero), torch.float32, q.shape, axis=axis)


def quantize_static(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """Fake quantization with a known scale, in the form (QDQ) that ONNX Runtime fuses."""
    q = _onnx("QuantizeLinear", (x, scale, zero), torch.uint8, x.shape)
    if (low, high) != (0, 255):
        q = q.clamp(low, high)
    return dequantize_linear(q, scale, zero)


def dynamic_scale(x: Tensor, axes: tuple[int, ...], qmax: int) -> Tensor:
    """max|x| / qmax over `axes`, which stay with size 1; a block of zeros gets 1."""
    scale = x.abs().amax(axes, keepdim=True) / qmax
    return torch.where(scale > 0, scale, 1.0)


def quantize_dynamic(x: Tensor, axes: tuple[int, ...], qmax: int) -> Tensor:
    """Fake quantization with scales from `x` itself, so that nothing is out of range."""
    scale = dynamic_scale(x, axes, qmax)
    return torch.round(x / scale) * scale


def quantize_tokens(
    x: Tensor, axes: tuple[int, ...], qmax: int, one: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """(q + 128 as uint8, scale) with scales from `x`; `one` and `zero` are the constants 1 and 128.

    QuantizeLinear takes no scale per row of a batch, so the division comes before it.
    """
    scale = dynamic_scale(x, axes, qmax)
    return _onnx("QuantizeLinear", (x / scale, one, zero), torch.uint8, x.shape), scale


def integer_linear(
    quantized: tuple[Tensor, Tensor],
    zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Sum of (q - zero) (w - z) in int32, times both scales: (…, K) and (K, N) to (…, N)."""
    q, scale = quantized
    shape = (*q.shape[:-1], weight.shape[1])
    total = _onnx("MatMulInteger", (q, weight, zero, weight_zero), torch.int32, shape)
    y = total.float() * scale * weight_scale
    return y if bias is None else y + bias


def qdq_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None
) -> Tensor:
    """x @ dequantize(weight (K, N)) + bias: one integer kernel if `x` is dequantized as well."""
    w = dequantize_linear(weight, scale, zero, 1)
    # A matrix times a matrix, plus a bias, would become a Gemm, which has no such kernel.
    y = (x.unsqueeze(0) @ w).squeeze(0) if x.ndim == 2 else x @ w
    return y if bias is None else y + bias


def nbits_linear(x: Tensor, planes: Planes, bias: Tensor | None, bits: int, block: int) -> Tensor:
    """Sum of `MatMulNBits` over planes (data (N, blocks, bytes), scale, zero), plus bias.

    `accuracy_level` 1 is float32 arithmetic; without it the kernel may round activations to int8.
    """
    total = bias
    for data, scale, zero in planes:
        y = _onnx(
            "com.microsoft::MatMulNBits",
            (x, data, scale, zero),
            torch.float32,
            (*x.shape[:-1], data.shape[0]),
            K=int(x.shape[-1]),
            N=data.shape[0],
            bits=bits,
            block_size=block,
            accuracy_level=1,
        )
        total = y if total is None else total + y
    assert total is not None
    return total


def gather_rows(
    ids: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group: Tensor | None,
    width: int,
    bits: int,
) -> Tensor:
    """Rows of a table of unsigned `bits` each, low bits first; only these are dequantized."""
    q = data[ids].float()
    if bits < 8:  # in float: the exporter writes shifts of uint8 with mixed types
        shifted = [torch.floor(q / 2**shift) for shift in range(0, 9, bits)]
        fields = [this - after * 2**bits for this, after in pairwise(shifted)]
        q = torch.stack(fields, -1).flatten(-2)[..., :width]
    z = torch.tensor(2 ** (bits - 1)) if zero is None else zero[ids]
    return dequantize(q, scale[ids], z, group)


def dequantize(q: Tensor, scale: Tensor, zero: Tensor | None, group: Tensor | None) -> Tensor:
    """(q - zero) * scale in plain operators.

    `group` (width,) is the number of each column's scale, None for one scale in a row. For a stored
    weight all of these are constants, and ONNX Runtime evaluates them when it opens the file.
    """
    q = q.float()
    if zero is not None:
        q = q - _spread(zero, group).float()
    return q * _spread(scale, group)


def _spread(values: Tensor, group: Tensor | None) -> Tensor:
    return values if group is None or values.ndim == 0 else values[..., group]
