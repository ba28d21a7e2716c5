"""Products: MatMul, Gemm, Einsum."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompiler.capture.onnx.call import Call
from qcompiler.capture.onnx.table import op


@op("MatMul")
def matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@op("Gemm")
def gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None) -> Tensor:
    """alpha · A' B' + beta · C, as `linear` where it is one."""
    alpha, beta = call.float("alpha", 1.0), call.float("beta", 1.0)
    a = a.t() if call.int("transA", 0) else a
    transposed = bool(call.int("transB", 0))
    if alpha == 1.0 and not (beta != 1.0 and c is not None):
        weight = b if transposed else b.t()
        if c is None or c.shape == weight.shape[:1]:
            return torch.nn.functional.linear(a, weight, c)
    y = a @ (b.t() if transposed else b)
    y = y if alpha == 1.0 else y * _like(alpha, y)
    if c is None:
        return y
    return y + (c if beta == 1.0 else c * _like(beta, c))


def _like(factor: float, x: Tensor) -> float | int:
    """A factor that leaves integers integers."""
    return factor if x.is_floating_point() else int(factor)


@op("Einsum")
def einsum(call: Call, *operands: Tensor) -> Tensor:
    return torch.einsum(call.text("equation"), *operands)
