"""Functions of a vector of float32."""

from __future__ import annotations

import math

from qcompiler.backends.cpu.codegen.emit import FLOAT, I32, Code, Value, vector

SERIES = (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)


def exp(code: Code, x: Value) -> Value:
    """e^x = 2^n e^r with |r| < ln 2 / 2, e^r by a polynomial (Cephes' expf: 2e-7). What would leave
    float32's normal numbers stops there: e^-87 is the least."""
    b, lanes = code.b, x.type.count

    def number(value: float) -> Value:
        return code.constant(FLOAT, value, lanes)

    # Comparisons with NaN are false: it stays.
    x = b.select(b.fcmp_ordered(">", x, number(88.0)), number(88.0), x)
    x = b.select(b.fcmp_ordered("<", x, number(-87.0)), number(-87.0), x)
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
