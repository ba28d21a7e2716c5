"""Tiles of x Wᵀ with weights that are decoded in registers, by all warps of a program together.

The weight is the left operand, (rows, lanes) of one plane; activations, (lanes, tokens), the right
one. Codes enter the product as exact small numbers, and the scale of a group multiplies its sum: of
16-bit activations in float32, of int8 in int32, exactly: over all inputs of a part where a row has
one scale (`ONE`), else over a group, a block at a time.

On Hopper a product is one of four warps (wgmma, weights in registers). Scales come a block ahead,
as nothing else hides how long they take. For a few tokens there is `few.py`. On Hopper both start
while the kernel in front of them ends (programmatic dependent launch).
"""

# Tuples grow while triton reads a kernel; of that it takes no annotation.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qcompiler.backends.triton.codes import PLAIN, cast, decode, dot
from qcompiler.backends.triton.fragments import beside

VARIED = ("tokens", "blocks", "part")
"""Sizes for whose values no kernel is compiled anew."""


@triton.jit
def _scales(at, block, padded, SPAN: tl.constexpr, SHARED: tl.constexpr, PLANES: tl.constexpr):
    """Those of each group of a block."""
    found = ()
    for first in tl.static_range(0, PLANES, SHARED):
        found += (tl.load(at + (block * PLANES + first) // SPAN * padded),)
    return found


@triton.jit(do_not_specialize=VARIED)
def many(
    x, x_scale, units, scale, zero, bias, y,
    tokens, width, rows, padded, block_step, row_step, blocks, part,
    SPAN: tl.constexpr, SHARED: tl.constexpr, PLANES: tl.constexpr, LANES: tl.constexpr,
    KIND: tl.constexpr, ZERO: tl.constexpr, ONE: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile of (rows, tokens), summed over `part` blocks from program_id(2) on. Blocks of a row
    are `block_step` units apart, rows `row_step`; SPAN is a group in planes, and SHARED planes of a
    block have one scale."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    p = tl.arange(0, LANES)
    start = tl.program_id(2) * part
    end = tl.minimum(start + part, blocks)
    left = units + n[:, None] * row_step + p[None, :]
    right = x + tl.minimum(m, tokens - 1).to(tl.int64)[None, :] * width + p[:, None]
    s_at = scale + beside(n)
    if EARLY:
        gdc_launch_dependents()
    ahead = () if ONE else _scales(s_at, start, padded, SPAN, SHARED, PLANES)
    if EARLY:
        gdc_wait()
    SUM: tl.constexpr = tl.int32 if tl.int8 == DTYPE else tl.float32
    acc = tl.zeros((ROWS, TOKENS), SUM if ONE else tl.float32)
    for block in range(start, end):
        unit = tl.load(left + block * block_step)
        scales = ahead
        if not ONE:
            ahead = _scales(s_at, tl.minimum(block + 1, end - 1), padded, SPAN, SHARED, PLANES)
        for first in tl.static_range(0, PLANES, SHARED):
            z = 0
            if ZERO:
                side = (block * PLANES + first) // SPAN * padded
                z = tl.load(zero + side + beside(n))[:, None]
            sums = acc if ONE else tl.zeros((ROWS, TOKENS), SUM)
            for j in tl.static_range(first, first + SHARED):
                k = (block * PLANES + j) * LANES
                if EVEN:
                    a = tl.load(right + k)
                else:
                    a = tl.load(right + k, mask=k + p[:, None] < width, other=0.0)
                sums = dot(decode(unit, z, j, KIND, ZERO, DTYPE), a, sums)
            if ONE:
                acc = sums
            else:
                acc += sums.to(tl.float32) * scales[first // SHARED].to(tl.float32)[:, None]
    finish(acc, x_scale, scale, bias, y, n, m, tokens, rows, ONE, KIND)


@triton.jit
def finish(acc, x_scale, scale, bias, y, n, m, tokens, rows, ONE: tl.constexpr, KIND: tl.constexpr):
    """Scales of tokens, and of rows that have one, bias and the store of a tile (rows, tokens)."""
    acc = acc.to(tl.float32)
    if x_scale is not None:
        acc *= tl.load(x_scale + m, mask=m < tokens, other=0.0)[None, :]
    if ONE:
        at = n if KIND == PLAIN else beside(n)
        acc *= tl.load(scale + at).to(tl.float32)[:, None]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
    at = (tl.program_id(2).to(tl.int64) * tokens + m[None, :]) * rows + n[:, None]
    inside = (n < rows)[:, None] & (m < tokens)[None, :]
    tl.store(y + at, cast(acc, y.dtype.element_ty), mask=inside)
