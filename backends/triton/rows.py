"""Activations rounded per token, to int8 or e4m3 codes: s = max|x| / top, q = round(x / s).

Codes are bit for bit those of the reference. Rows are padded with zeros to whole tiles of the
product that reads them. `hadamard.py` does the same behind a Hadamard transform.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qcompiler.backends.triton.codes import EMULATED
from qcompiler.backends.triton.layout import INNER, padded
from qcompiler.backends.triton.operators import early, operator, rows_of

ROUND = tl.constexpr(12582912.0)
"""1.5 · 2^23: added, it leaves a number rounded to an integer, half to even, in its lowest bits."""
SMALLEST = tl.constexpr(1.1754943508222875e-38)
"""Where scales stop: float32's smallest normal number."""


@triton.jit
def _e4m3(u, y):
    """Bits of the number of e4m3 nearest to |u|, half to even, with the sign of y, by integer
    arithmetic: a conversion that every GPU has, and that the interpreter gets right too."""
    size = tl.minimum(tl.abs(u), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (size + ROUND / 512).to(tl.int32, bitcast=True)  # below 2^-6 steps are 2^-9
    sign = (y.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(size < 0.015625, small, normal) | sign).to(tl.uint8)


@triton.jit
def encode(u, y, INSIDE: tl.constexpr, FP8: tl.constexpr):
    """Codes of u, a y in units of its scale; `INSIDE`: none is beyond the largest code."""
    if FP8:
        return _e4m3(u, y)
    else:
        if not INSIDE:
            u = tl.clamp(u, -127.0, 127.0)
        return (u + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def scale_of(largest, given, FP8: tl.constexpr):
    """The scale that is given, else the one that lets the largest magnitude have the top code."""
    if given is not None:
        return largest * 0 + tl.load(given).to(tl.float32)
    s = tl.div_rn(largest, largest * 0 + (448.0 if FP8 else 127.0))
    return tl.where(largest == 0, 1.0, tl.maximum(s, SMALLEST))


@triton.jit
def quotient(y, s):
    """y / s to nearest for one s and |y / s| < 2^10, but for the sign of 0, in five operations:
    high + low is 1 / s to 48 bits, so that q is off by less than a unit in its last place, and its
    remainder makes that good (Brisebarre, Muller, Raina, "Accelerating correctly rounded division
    when the divisor is known in advance", 2004). Where s is tiny, remainders would be lost: both
    are scaled."""
    if EMULATED:  # there, a multiply-add rounds twice
        return tl.div_rn(y, s)
    else:
        lift = tl.where(s < 8.271806125530277e-25, 18446744073709551616.0, 1.0)  # 2^-80, 2^64
        s, y = s * lift, y * lift
        one = s * 0 + 1.0
        high = tl.div_rn(one, s)
        low = tl.fma(high, -s, one) * high
        q = tl.fma(y, high, y * low)
        return tl.fma(tl.fma(q, -s, y), high, q)


@triton.jit
def in_units(y, s, SHORT: tl.constexpr):
    """y / s, or, if y has 16 bits, a number that is encoded as it would be: of all the 2^33 pairs
    of fractions 12 differ from it by a digit, and none of these lies where codes change."""
    if SHORT and not EMULATED:
        if s < 1.2676506002282294e30:  # 2^100: beyond, `low` would lose digits
            one = s * 0 + 1.0
            high = tl.div_rn(one, s)
            low = tl.div_rn(tl.fma(high, -s, one), s)
            u = tl.fma(y, high, y * low)
        else:
            u = quotient(y, s)
    else:
        u = quotient(y, s)
    return u


@triton.jit
def _round(
    x, given, codes, scales, width, inner,
    FP8: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row for each program."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    y = tl.load(x + row * width + k, mask=k < width, other=0.0)
    SHORT: tl.constexpr = y.dtype.primitive_bitwidth == 16
    y = y.to(tl.float32)
    s = scale_of(tl.max(tl.abs(y), 0), given, FP8)
    if given is not None:
        most = s * (448.0 if FP8 else 127.0)
        y = tl.clamp(y, -most, most)
    tl.store(codes + row * inner + k, encode(in_units(y, s, SHORT), y, True, FP8), mask=k < inner)
    tl.store(scales + row, s)


def _shape(x: Tensor, given: Tensor | None, fp8: bool) -> tuple[Tensor, Tensor]:
    return buffers(x, fp8)


@operator(_shape)
def round_rows(x: Tensor, given: Tensor | None, fp8: bool) -> tuple[Tensor, Tensor]:
    """x (…, n) → codes (…, n padded), int8 or the bits of e4m3 in uint8, and scales (…, 1) float32;
    `given` is a static scale for all."""
    codes, scales = buffers(x, fp8)
    flat = rows_of(x)
    if flat.shape[0]:
        inner = codes.shape[-1]
        block = triton.next_power_of_2(inner)
        torch.library.wrap_triton(_round)[(flat.shape[0],)](
            flat, given, codes, scales, flat.shape[1], inner, FP8=fp8, BLOCK=block,
            num_warps=min(max(block // 1024, 1), 32), **early(x),
        )  # fmt: skip
    return codes, scales


def buffers(x: Tensor, fp8: bool) -> tuple[Tensor, Tensor]:
    """Empty codes and scales for rows of x."""
    lead = x.shape[:-1]
    inner = padded(x.shape[-1], INNER)
    codes = x.new_empty((*lead, inner), dtype=torch.uint8 if fp8 else torch.int8)
    return codes, x.new_empty((*lead, 1), dtype=torch.float32)
