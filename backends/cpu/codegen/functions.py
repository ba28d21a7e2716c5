"""Functions of a vector of float32. NaN stays what it is: comparisons with it are false.

============  ============================================================================
`relu`        max(x, 0)
`relu6`       min(max(x, 0), 6)
`hardswish`   x · relu6(x + 3) / 6                            (MobileNetV3, Howard et al. 2019)
`silu`        x / (1 + e^-x)
`gelu`        x Φ(x), the error function by Abramowitz and Stegun 7.1.26, |error| < 2e-7
`gelu_tanh`   x / (1 + e^-2u), u = √(2/π) (x + 0.044715 x³)
============  ============================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable

from qcompiler.backends.cpu.codegen.emit import FLOAT, I32, Code, Value, vector

SERIES = (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)


def exp(code: Code, x: Value) -> Value:
    """e^x = 2^n e^r with |r| < ln 2 / 2, e^r by a polynomial (Cephes' expf: 2e-7). What would leave
    float32's normal numbers stops there: e^-87 is the least."""
    b, lanes = code.b, x.type.count

    def number(value: float) -> Value:
        return code.constant(FLOAT, value, lanes)

    x = _limited(code, _limited(code, x, ">", 88.0), "<", -87.0)
    n = code.call(f"llvm.rint.v{lanes}f32", x.type, b.fmul(x, number(1 / math.log(2))))
    r = code.fma(n, number(-0.693359375), x)
    r = code.fma(n, number(2.12194440e-4), r)
    series = number(1.9875691500e-4)
    for term in SERIES:
        series = code.fma(series, r, number(term))
    value = b.fadd(code.fma(b.fmul(series, r), r, r), number(1.0))
    whole = b.fptosi(n, vector(I32, lanes))
    bits = b.add(whole, code.constant(I32, 127, lanes))
    power = b.bitcast(b.shl(bits, code.constant(I32, 23, lanes)), x.type)
    return b.fmul(value, power)


def relu(code: Code, x: Value) -> Value:
    return _limited(code, x, "<", 0.0)


def relu6(code: Code, x: Value) -> Value:
    return _limited(code, relu(code, x), ">", 6.0)


def hardswish(code: Code, x: Value) -> Value:
    b = code.b
    return b.fdiv(b.fmul(x, relu6(code, b.fadd(x, _number(code, 3.0, x)))), _number(code, 6.0, x))


def silu(code: Code, x: Value) -> Value:
    return _over_one_plus_exp(code, x, code.b.fneg(x))


def gelu_tanh(code: Code, x: Value) -> Value:
    b = code.b
    cubic = b.fmul(b.fmul(x, x), _number(code, 0.044715, x))
    inner = b.fmul(x, b.fadd(cubic, _number(code, 1.0, x)))
    exponent = b.fmul(inner, _number(code, -2 * math.sqrt(2 / math.pi), x))
    return _over_one_plus_exp(code, x, exponent)


def gelu(code: Code, x: Value) -> Value:
    b = code.b
    z = b.fmul(x, _number(code, math.sqrt(0.5), x))
    size = code.call(f"llvm.fabs.v{x.type.count}f32", x.type, z)
    one = _number(code, 1.0, x)
    t = b.fdiv(one, b.fadd(one, b.fmul(size, _number(code, 0.3275911, x))))
    series = _number(code, 1.061405429, x)
    for term in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = code.fma(series, t, _number(code, term, x))
    tail = b.fmul(b.fmul(series, t), exp(code, b.fneg(b.fmul(z, z))))
    # Φ(x) is tail / 2 on the left and 1 - tail / 2 on the right.
    half = b.fmul(tail, _number(code, 0.5, x))
    left = b.fcmp_ordered("<", x, _number(code, 0.0, x))
    return b.fmul(x, b.select(left, half, b.fsub(one, half)))


FUNCTIONS: dict[str, Callable[[Code, Value], Value]] = {
    "relu": relu,
    "relu6": relu6,
    "hardswish": hardswish,
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}
"""By the names that operators are told."""


def _limited(code: Code, x: Value, beyond: str, end: float) -> Value:
    limit = _number(code, end, x)
    return code.b.select(code.b.fcmp_ordered(beyond, x, limit), limit, x)


def _over_one_plus_exp(code: Code, x: Value, exponent: Value) -> Value:
    b = code.b
    return b.fdiv(x, b.fadd(_number(code, 1.0, x), exp(code, exponent)))


def _number(code: Code, value: float, like: Value) -> Value:
    return code.constant(FLOAT, value, like.type.count)
