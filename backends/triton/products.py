"""Tiles of x Wᵀ with weights that are decoded in registers.

The weight is the left operand, (rows, lanes) of one plane; activations, (lanes, tokens), the right
one. Codes enter the product as exact small numbers, and the scale of a group multiplies its sum: of
16-bit activations in float32, of int8 in int32, exactly: over all inputs of a part where a row has
one scale (`ONE`), else over a group, a block at a time.

`few`    a few tokens, where reading the weight is what takes time. Each warp of a program takes
         blocks of its own, so that a multiprocessor has much in flight while a program has few
         rows; their sums are added at the end. Products of one warp's own (mma), also on Hopper,
         of numbers that are loaded where they are wanted (`fragments.py`): no warp waits for
         another. `LATE`: zero points are taken off the sums of a group, not off each number.
`many`   all warps share each product; on Hopper one of four warps (wgmma, weights in registers).

Scales come a block ahead, as nothing else hides how long they take. On Hopper both start while the
kernel in front of them ends (programmatic dependent launch).
"""

# Tuples grow while triton reads a kernel; of that it takes no annotation.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qcompiler.backends.triton.codes import (
    EMULATED,
    LIFT,
    PLAIN,
    cast,
    decode,
    dot,
    integers,
    lifted,
)
from qcompiler.backends.triton.fragments import (
    RUN_OF_BYTES,
    beside,
    factor,
    places,
    sides_of,
    spread,
)

VARIED = ("tokens", "blocks", "part")
"""Sizes for whose values no kernel is compiled anew."""


@triton.jit
def _fetch(
    units, warp, scale, zero, group, block, end, step, padded,
    SPAN: tl.constexpr, SHARED: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """What warps decode of blocks from `block` on: units, and scales and zero points of each group
    of a block. `warp` says whose are units, `group` whose the others."""
    w, g = block + warp, block + group
    unit = tl.load(units + w * step, mask=w < end, other=0, eviction_policy="evict_first")
    scales, zeros = (), ()
    for first in tl.static_range(0, PLANES, SHARED):
        side = (g * PLANES + first) // SPAN * padded
        if scale is not None:
            scales += (tl.load(scale + side, mask=g < end, other=0),)
        if zero is not None:
            zeros += (tl.load(zero + side, mask=g < end, other=0),)
    return unit, scales, zeros


@triton.jit(do_not_specialize=VARIED)
def few(
    x, x_scale, units, scale, zero, bias, y,
    tokens, width, rows, padded, block_step, row_step, blocks, part,
    SPAN: tl.constexpr, SHARED: tl.constexpr, PLANES: tl.constexpr, LANES: tl.constexpr,
    KIND: tl.constexpr, ZERO: tl.constexpr, ONE: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr,
    LATE: tl.constexpr, ORDERED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile of (rows, tokens), summed over `part` blocks from program_id(2) on. Blocks of a row
    are `block_step` units apart, rows `row_step`; SPAN is a group in planes, and SHARED planes of a
    block have one scale. While a block is decoded, the next is on its way."""
    BYTES: tl.constexpr = tl.int8 == DTYPE
    EACH: tl.constexpr = RUN_OF_BYTES if BYTES else 2
    SIZE: tl.constexpr = 1 if BYTES else 2
    SUM: tl.constexpr = tl.int32 if BYTES else tl.float32
    start = tl.program_id(2) * part
    end = tl.minimum(start + part, blocks)
    n0, m0 = tl.program_id(0) * ROWS, tl.program_id(1) * TOKENS
    if BYTES:  # words of four
        units = units.to(tl.pointer_type(tl.int32), bitcast=True)
        block_step //= 4
        row_step //= 4
        row, warp, lanes = places(ROWS, WARPS, LANES // 4, 4)
    else:
        row, warp, lanes = places(ROWS, WARPS, LANES, SIZE)
    left = units + (n0 + row) * row_step + lanes
    side, group = sides_of(ROWS, WARPS)
    s_at = None if ONE else scale + n0 + side
    z_at = zero + n0 + side if ZERO else None
    token, w, lanes = places(TOKENS, WARPS, LANES, SIZE)
    inner = w * (PLANES * LANES) + lanes
    right = x + tl.minimum(m0 + token, tokens - 1) * width + inner
    if EARLY:
        gdc_launch_dependents()
    # No kernel of ours writes weights: the first are asked for before the one in front is done.
    ahead = _fetch(
        left, warp, s_at, z_at, group, start, end, block_step, padded, SPAN, SHARED, PLANES
    )
    if EARLY:
        gdc_wait()
    acc = tl.zeros((WARPS, ROWS, TOKENS), SUM if ONE else tl.float32)
    for block in range(start, end, WARPS):
        unit, scales, zeros = ahead
        ahead = _fetch(
            left, warp, s_at, z_at, group, block + WARPS, end, block_step, padded, SPAN, SHARED,
            PLANES,
        )  # fmt: skip
        if ORDERED and not EMULATED:
            # Else the compiler may move these loads behind what is computed, for want of registers.
            tl.inline_asm_elementwise(
                "bar.warp.sync 0xffffffff; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
            )
        rights = ()
        for j in tl.static_range(PLANES):
            k = (block * PLANES + j) * LANES
            if EVEN:
                a = tl.load(right + k)
            else:
                a = tl.load(right + k, mask=k + inner < width, other=0.0)
            a = factor(a, TOKENS, WARPS, LANES, EACH)
            rights += (tl.permute(a, (0, 2, 1)),)
        if BYTES:
            unit = factor(unit, ROWS, WARPS, LANES // 4, EACH // 4)
        else:
            unit = factor(unit, ROWS, WARPS, LANES, EACH)
        for first in tl.static_range(0, PLANES, SHARED):
            z = 0
            if ZERO and BYTES:
                z = zeros[first // SHARED].to(tl.int32) * 0x01010101
                z = spread(z, ROWS, WARPS, LANES // (4 * EACH), EACH // 4)
            elif ZERO and not LATE:
                z = spread(zeros[first // SHARED], ROWS, WARPS, LANES // (4 * EACH), EACH)
            sums = acc if ONE else tl.zeros((WARPS, ROWS, TOKENS), SUM)
            # What all rows must take away: the sum of activations, by 16 rows of ones.
            plain = tl.zeros((WARPS, 16, TOKENS), SUM)
            for j in tl.static_range(first, first + SHARED):
                if BYTES:
                    sums = dot(integers(unit, z, j, KIND, ZERO), rights[j], sums)
                elif LATE:
                    sums = dot(lifted(unit, j, DTYPE), rights[j], sums)
                    plain = dot(tl.full((WARPS, 16, LANES), 1.0, DTYPE), rights[j], plain)
                else:
                    sums = dot(decode(unit, z, j, KIND, ZERO, DTYPE), rights[j], sums)
            if LATE:
                lift = LIFT + 8.0
                if ZERO:
                    z = spread(zeros[first // SHARED], ROWS, WARPS, TOKENS // 8, 2)
                    lift = LIFT + z.to(tl.float32)
                plain = tl.broadcast_to(plain[:, None, :, :], (WARPS, ROWS // 16, 16, TOKENS))
                sums -= lift * tl.reshape(plain, (WARPS, ROWS, TOKENS))
            if ONE:
                acc = sums
            else:
                s = spread(scales[first // SHARED], ROWS, WARPS, TOKENS // 8, 2)
                acc += sums.to(tl.float32) * s.to(tl.float32)
    n, m = n0 + tl.arange(0, ROWS), m0 + tl.arange(0, TOKENS)
    _finish(tl.sum(acc, 0), x_scale, scale, bias, y, n, m, tokens, rows, ONE, KIND)


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
    """The same, by all warps together."""
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
    _finish(acc, x_scale, scale, bias, y, n, m, tokens, rows, ONE, KIND)


@triton.jit
def _finish(
    acc, x_scale, scale, bias, y, n, m, tokens, rows, ONE: tl.constexpr, KIND: tl.constexpr
):
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
