"""Files quantized by others: integer arithmetic raised, their formats adopted and served.

Modules here spell out what the importer of ONNX makes of DynamicQuantizeLinear, MatMulInteger,
QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

import pytest
import torch
from test_canonicalize import X, canonical, operators
from torch import Tensor

from qcompiler import Program
from qcompiler.formats import Grid, QFormat, QTensor, unpack
from qcompiler.pipeline import run_pipeline
from qcompiler.registry import make_passes

qc = torch.ops.qc
DYNAMIC = "uint8:tensor:asym:dynamic"
GENERATOR = torch.Generator().manual_seed(5)
Q = torch.randint(-127, 128, (8, 6), dtype=torch.int8, generator=GENERATOR)
SCALES = torch.rand(6, generator=GENERATOR) * 0.01 + 0.001
ZEROS = torch.randint(-5, 5, (6,), dtype=torch.int8, generator=GENERATOR)
BIAS = torch.randn(6, generator=GENERATOR)


def adopted(program: Program) -> list[str]:
    """The schemes of the sites, in order."""
    return [str(s) for s in run_pipeline(program, make_passes("adopt")).plan.values()]


def quantized(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DynamicQuantizeLinear"""
    scale, zero = qc.dynamic_scale(x, DYNAMIC)
    q = qc.quantize(x, DYNAMIC, scale, zero, torch.uint8)
    return q, scale.reshape([]), zero.reshape([]).to(torch.uint8)


def matmul_integer(a: Tensor, b: Tensor, az: Tensor, bz: Tensor | None) -> Tensor:
    b = b.to(torch.int32)
    b = b if bz is None else b - bz.to(torch.int32)
    return (a.to(torch.int32) - az.to(torch.int32)) @ b


@pytest.mark.parametrize(
    ("scale", "zero", "expected"),
    [
        (SCALES, None, "int8:channel"),
        (SCALES, ZEROS, "int8:channel:asym"),
        (SCALES, torch.zeros(6, dtype=torch.int8), "int8:channel"),
        (SCALES[:1], None, "int8:tensor"),
        (SCALES[0], torch.tensor(3, dtype=torch.int8), "int8:tensor:asym"),
    ],
)
def test_dynamic_products(scale: Tensor, zero: Tensor | None, expected: str) -> None:
    def run(x: Tensor, w: Tensor, s: Tensor, b: Tensor, wz: Tensor | None = None) -> Tensor:
        q, xs, xz = quantized(x)
        return matmul_integer(q, w, xz, wz).float() * (xs * s) + b

    zeros = {} if zero is None else {"zero": zero}
    program = canonical(run, X, weight=Q, scale=scale, bias=BIAS, **zeros)
    assert operators(program) == {"qc.fake_quantize": 1, "qc.dequantize": 1, "linear": 1}
    assert adopted(program) == [f"weight={expected} activation={DYNAMIC}"]
    data = unpack(program.params["weight.data"], 8, 8, True)
    zeros = program.params.get("weight.zero")
    grid = Grid(QFormat.parse(expected), program.params["weight.scale"], zeros)
    stored = QTensor(data, grid)
    wanted = (Q.double() - (0 if zero is None else zero)) * scale
    torch.testing.assert_close(stored.dequantize(torch.float64), wanted.t(), rtol=1e-6, atol=0)


def test_the_lowest_integer_takes_the_full_range() -> None:
    lowest = Q.clone()
    lowest[0, 0] = -128

    def run(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        q, xs, xz = quantized(x)
        return matmul_integer(q, w, xz, None).float() * (s * xs)

    program = canonical(run, X, weight=lowest, scale=SCALES)
    assert adopted(program) == [f"weight=int8:channel:full activation={DYNAMIC}"]


def test_dynamic_convolution() -> None:
    kernel = torch.randint(0, 255, (4, 3, 2, 2), dtype=torch.uint8, generator=GENERATOR)

    def run(x: Tensor, w: Tensor, s: Tensor, wz: Tensor) -> Tensor:
        q, xs, xz = quantized(x)
        q, xz = q.to(torch.int32), xz.to(torch.int32)
        centred = (w.to(torch.int32) - wz.to(torch.int32)).double()
        y = torch.nn.functional.conv2d((q - xz).double(), centred, None, 2)
        return y.to(torch.int32).float() * (xs * s)

    images = torch.randn(2, 3, 6, 6, generator=GENERATOR)
    zero = torch.tensor(120, dtype=torch.uint8)
    program = canonical(run, images, weight=kernel, scale=SCALES[:1], zero=zero)
    assert operators(program)["conv2d"] == 1 and "matmul" not in operators(program)
    assert adopted(program) == [f"weight=uint8:tensor:asym activation={DYNAMIC}"]


def test_another_range_is_no_product_of_rounded_numbers() -> None:
    """The scale must be that of the integers."""

    def run(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        q, _, xz = quantized(x)
        _, other, _ = quantized(x + 1)
        return matmul_integer(q, w, xz, None).float() * (other * s)

    assert "linear" not in operators(canonical(run, X, weight=Q, scale=SCALES))


STATIC = "uint8:tensor:asym"


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
def test_static_quantization(rows: bool) -> None:
    """QDQ: a weight in rows (Gemm, transB) or columns (MatMul), one scale for each output."""

    def run(x: Tensor, w: Tensor, s: Tensor, xs: Tensor, xz: Tensor, b: Tensor) -> Tensor:
        xs, xz = xs.reshape([1, 1, 1]), xz.reshape([1, 1, 1]).to(torch.int16)
        q = qc.quantize(x, STATIC, xs, xz, torch.uint8)
        x = qc.dequantize_integers(q, STATIC, xs, xz, torch.float32)
        block = "channel" if rows else "block*x1"
        s = s.reshape([6, 1] if rows else [1, 6])
        w = qc.dequantize_integers(w, f"int8:{block}:full", s, None, torch.float32)
        return torch.nn.functional.linear(x, w, b) if rows else x @ w + b

    weight = Q.t().contiguous() if rows else Q
    params = {"weight": weight, "scale": SCALES, "x_scale": torch.tensor(0.02)}
    program = canonical(run, X, **params, x_zero=torch.tensor(128, dtype=torch.uint8), bias=BIAS)
    assert operators(program) == {"qc.fake_quantize": 1, "qc.dequantize": 1, "linear": 1}
    assert adopted(program) == [f"weight=int8:channel activation={STATIC}"]


def test_rounding_between_different_scales_stays() -> None:
    def run(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        q = qc.quantize(x, "int8:tensor", s, None, torch.int8)
        return qc.dequantize_integers(q, "int8:tensor", t, None, torch.float32)

    two = {"scale": torch.tensor(0.02), "other": torch.tensor(0.03)}
    assert "qc.fake_quantize" not in operators(canonical(run, X, **two))


@pytest.mark.parametrize("group", ["block4x1", "block1x4"])
def test_groups(group: str) -> None:
    """Blocks along the contracted axis, whichever way the file stores the weight."""
    turned = group == "block4x1"

    def run(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        w = qc.dequantize_integers(w, f"int4:{group}:full", s, None, torch.float32)
        return x @ (w if turned else w.t())

    q, scale = Q // 16, torch.rand(2, 6, generator=GENERATOR) + 0.1
    weights = (q, scale) if turned else (q.t().contiguous(), scale.t().contiguous())
    program = canonical(run, X, weight=weights[0], scale=weights[1])
    assert adopted(program) == ["weight=int4:group4:full activation=float"]


def test_integers_that_are_moved_are_rounded_numbers_moved() -> None:
    def run(x: Tensor, s: Tensor) -> Tensor:
        q = qc.quantize(x, "int8:tensor", s.reshape([1, 1, 1]), None, torch.int8)
        q = q.reshape(3, 5, 2, 4).permute(0, 2, 1, 3)
        scale = s.reshape([1, 1, 1, 1])
        return qc.dequantize_integers(q, "int8:tensor", scale, None, torch.float32)

    found = operators(canonical(run, X, scale=torch.tensor(0.02)))
    assert found == {"qc.fake_quantize": 1, "reshape": 1, "transpose": 1}


def test_quantized_table() -> None:
    def run(tokens: Tensor, w: Tensor, s: Tensor, z: Tensor) -> Tensor:
        rows = torch.ops.aten.index.Tensor(w, [tokens])
        scale, zero = s.reshape([1, 1, 1]), z.reshape([1, 1, 1]).to(torch.int16)
        return qc.dequantize_integers(rows, "uint8:tensor:asym", scale, zero, torch.float32)

    tokens, table = torch.tensor([[1, 2, 3], [4, 5, 6]]), Q.to(torch.int16) + 127
    params = {"weight": table.to(torch.uint8), "scale": SCALES[0], "zero": torch.tensor(120)}
    program = canonical(run, tokens, **params)
    assert operators(program) == {"qc.dequantize": 1, "embedding": 1}
    assert adopted(program) == ["weight=uint8:tensor:asym activation=float"]
