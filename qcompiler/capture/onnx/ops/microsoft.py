"""Quantized operators of ONNX Runtime (`com.microsoft`), which its tools write into files."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qcompiler.capture.onnx.call import Call
from qcompiler.capture.onnx.ops.quantized import dequantize, qc, requantized
from qcompiler.capture.onnx.table import MICROSOFT, op

linear = torch.nn.functional.linear
INT8 = 4


@op("MatMulNBits", domain=MICROSOFT)
def matmul_nbits(call: Call, x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    """x Wᵀ with W (N, K) in unsigned integers of `bits`, blocks of `block_size` along K.

    At level 4 the kernel multiplies in int8: it rounds x block by block.
    """
    if call.given(4):
        raise call.refusal("its columns are reordered (g_idx); expected blocks in order")
    bits, block, width = call.int("bits"), call.int("block_size"), call.int("K")
    rows, blocks = call.int("N"), -(-width // block)
    stored = blocks * block
    zero = torch.from_numpy(_zero_points(call, bits, rows, blocks))
    weight = qc.dequantize(
        data.reshape(rows, -1),
        scale.reshape(rows, blocks).float(),
        zero,
        f"uint{bits}:group{block}:asym",
        stored,
        x.dtype,
    )
    if stored != width:  # the last block is filled up
        weight = weight[:, :width]
    if call.int("accuracy_level", 0) == INT8:
        x = qc.fake_quantize(x, f"int8:group{block}:dynamic")
    return linear(x, weight, call.tensor(5) if call.given(5) else None)


def _zero_points(call: Call, bits: int, rows: int, blocks: int) -> np.ndarray:
    """(rows, blocks) int16 from packed fields, low bits first; the middle of the range if none."""
    if not call.given(3):
        return np.full((rows, blocks), 2 ** (bits - 1), np.int16)
    packed = call.known(3)
    if packed.dtype != np.uint8:
        raise call.refusal(f"its zero points are {packed.dtype}; expected packed uint8")
    bits_of = np.unpackbits(packed.reshape(rows, -1), axis=1, bitorder="little")
    fields = bits_of[:, : blocks * bits].reshape(rows, blocks, bits)
    zeros: np.ndarray = (fields * (1 << np.arange(bits))).sum(-1).astype(np.int16)
    return zeros


@op("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_quantize_matmul(call: Call, x: Tensor) -> Tensor:
    """x (rounded to uint8 with its own range) times a stored matrix, plus bias."""
    rounded = qc.fake_quantize(x, "uint8:tensor:asym:dynamic")
    y: Tensor = rounded @ dequantize(call, 1, 2, 3, -1)
    return y + call.tensor(4) if call.given(4) else y


@op("MatMulIntegerToFloat", domain=MICROSOFT)
def matmul_integer_to_float(call: Call) -> Tensor:
    y = dequantize(call, 0, 2, 4, -2) @ dequantize(call, 1, 3, 5, -1)
    return y + call.tensor(6) if call.given(6) else y


@op("QGemm", domain=MICROSOFT)
def qgemm(call: Call) -> Tensor:
    a, b = dequantize(call, 0, 1, 2), dequantize(call, 3, 4, 5, 0 if call.int("transB", 0) else 1)
    a = a.t() if call.int("transA", 0) else a
    y = a @ (b.t() if call.int("transB", 0) else b)
    if call.given(6):
        y = y + call.tensor(6).float() * (call.tensor(1) * call.tensor(4)).float()
    y = y * call.float("alpha", 1.0)
    return requantized(call, y, 7, 8) if call.given(7) else y


@op("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def qlinear_binary(call: Call) -> Tensor:
    a, b = dequantize(call, 0, 1, 2), dequantize(call, 3, 4, 5)
    return requantized(call, a + b if call.node.op_type == "QLinearAdd" else a * b, 6, 7)


@op("QLinearSigmoid", "QLinearLeakyRelu", domain=MICROSOFT)
def qlinear_unary(call: Call) -> Tensor:
    x = dequantize(call, 0, 1, 2)
    if call.node.op_type == "QLinearSigmoid":
        return requantized(call, torch.sigmoid(x), 3, 4)
    leaky = torch.nn.functional.leaky_relu(x, call.float("alpha", 0.01))
    return requantized(call, leaky, 3, 4)


@op("QLinearGlobalAveragePool", domain=MICROSOFT)
def qlinear_global_average_pool(call: Call) -> Tensor:
    if call.int("channels_last", 0):
        raise call.refusal("channels_last; expected channels first")
    x = dequantize(call, 0, 1, 2)
    return requantized(call, x.mean(list(range(2, x.ndim)), keepdim=True), 3, 4)


@op("QLinearSoftmax", domain=MICROSOFT)
def qlinear_softmax(call: Call) -> Tensor:
    x = torch.softmax(dequantize(call, 0, 1, 2), call.int("axis", -1))
    return requantized(call, x, 3, 4)


@op("QLinearConcat", domain=MICROSOFT)
def qlinear_concat(call: Call) -> Tensor:
    """Inputs: scale and zero point of the result, then (data, scale, zero point) of each part."""
    parts = [dequantize(call, i, i + 1, i + 2) for i in range(2, len(call.values), 3)]
    return requantized(call, torch.cat(parts, call.int("axis")), 0, 1)
