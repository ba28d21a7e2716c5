"""The quantized kernels that ONNX Runtime alone has, or fuses, as functions of torch tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompiler.export.kernels import dequantize_linear, dynamic_scale, onnx_op

Planes = Sequence[tuple[Tensor, Tensor, Tensor | None]]


def quantize_tokens(
    x: Tensor, axes: tuple[int, ...], qmax: int, one: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """(q + 128 as uint8, scale) with scales from `x`; `one` and `zero` are the constants 1 and 128.

    QuantizeLinear takes no scale per row of a batch, so the division comes before it.
    """
    scale = dynamic_scale(x, axes, qmax)
    return onnx_op("QuantizeLinear", (x / scale, one, zero), torch.uint8, x.shape), scale


def widened(q: Tensor) -> Tensor:
    """Numbers stored in 4 bits as the same in 8, which the runtime computes once, on opening."""
    types = {torch.int8: 3, torch.uint8: 2}
    return onnx_op("Cast", (q,), q.dtype, q.shape, to=types[q.dtype])


def integer_linear(
    quantized: tuple[Tensor, Tensor],
    zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    bias: Tensor | None,
    wide: bool,
) -> Tensor:
    """Sum of (q - zero) (w - z) in int32, times both scales: (…, K) and (K, N) to (…, N)."""
    q, scale = quantized
    shape = (*q.shape[:-1], weight.shape[1])
    if not wide:
        weight = widened(weight)
        weight_zero = None if weight_zero is None else widened(weight_zero)
    total = onnx_op("MatMulInteger", (q, weight, zero, weight_zero), torch.int32, shape)
    y = total.float() * scale * weight_scale
    return y if bias is None else y + bias


def qdq_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, wide: bool
) -> Tensor:
    """x @ dequantize(weight (K, N)) + bias: one integer kernel if `x` is dequantized as well."""
    if not wide:
        weight, zero = widened(weight), None if zero is None else widened(zero)
    w = dequantize_linear(weight, scale, zero, 1)
    # A matrix times a matrix, plus a bias, would become a Gemm, which has no such kernel.
    y = (x.unsqueeze(0) @ w).squeeze(0) if x.ndim == 2 else x @ w
    return y if bias is None else y + bias


def nbits_linear(
    x: Tensor, planes: Planes, bias: Tensor | None, bits: int, block: int, level: int
) -> Tensor:
    """Sum of `MatMulNBits` over planes (data (N, blocks, bytes), scale, zero), plus bias.

    `level`, its `accuracy_level`: 1 is float32 arithmetic; 4 rounds x to int8, block by block.
    """
    total = bias
    for data, scale, zero in planes:
        y = onnx_op(
            "com.microsoft::MatMulNBits",
            (x, data, scale, zero),
            torch.float32,
            (*x.shape[:-1], data.shape[0]),
            K=int(x.shape[-1]),
            N=data.shape[0],
            bits=bits,
            block_size=block,
            accuracy_level=level,
        )
        total = y if total is None else total + y
    assert total is not None
    return total
