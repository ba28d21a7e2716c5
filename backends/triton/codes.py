"""Decoding 4-bit codes in registers, and products that the interpreter can do too.

A code u is made a number without a conversion, which is slow: where its bits lie in the fraction of
a float32 whose exponent is that of 16, OR-ed into 16.0, they add u/1, u/16 or u/256. So one shift
of a word serves three planes; what is in the way is taken off behind:

    word << 3  │ exponent of 16 │ u4: 16 + u │ u3: 16 + u/16 │ u2: 16 + u/256 │ …

`UNIT` (1, 16 or 256) times the number is `LIFT` (16 UNIT) + u, exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.backends.triton.runtime import interpreted

FP4 = tl.constexpr(1)
"""e2m1: sign, two bits of exponent, one of fraction (OCP MX v1.0, 5.3.3)."""
EMULATED = tl.constexpr(interpreted())


@triton.constexpr_function
def unit(j, kind):
    """What the number of plane j is to be multiplied with."""
    place = 7 - j if j >= 5 else 4 - j if j >= 2 else 2 - j
    return 1.0 if kind == 1 else 16.0**place


@triton.constexpr_function
def lift(j, kind):
    """What has then been added to its code."""
    return 0.0 if kind == 1 else 16.0 * unit(j, kind)


@triton.jit
def plane(word, j: tl.constexpr, KIND: tl.constexpr):
    """Numbers of plane j in float32: (`lift` + u) / `unit`, or what e2m1 stands for."""
    if KIND == FP4:
        return _fp4(word >> (4 * j))
    else:
        return _integer(word, j)


@triton.jit
def _integer(word, j: tl.constexpr):
    if j >= 5:
        bits = (word >> 9) & (15 << (4 * j - 9))
    elif j >= 2:
        bits = (word << 3) & (15 << (4 * j + 3))
    else:
        bits = (word << 11) & (15 << (4 * j + 11))
    return (bits | 0x41800000).to(tl.float32, bitcast=True)


@triton.jit
def _fp4(u):
    """Its fields as the lowest of float32's exponent and the highest of its fraction, times 2^126:
    subnormal numbers come out right of themselves."""
    bits = ((u & 7) << 22) | ((u & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def dot(a, b, acc):
    """acc + a b. The interpreter multiplies bfloat16 as if they were integers, so that there the
    rounded numbers are widened first, which changes nothing."""
    if EMULATED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """x in another type, rounded to nearest; the interpreter would cut bfloat16's digits off."""
    if EMULATED and tl.bfloat16 == DTYPE and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)
