"""Tiles of x Wᵀ with weights that are decoded in registers.

The weight is the left operand, (rows, lanes) of one plane; activations, (lanes, tokens), the right
one. Codes enter the product as exact small numbers, and the scale of a group multiplies its sum: of
16-bit activations in float32, of int8 in int32, exactly: over all inputs of a part where a row has
one scale (`ONE`), else over a group, a block at a time.

`few`    a few tokens, where reading the weight is what takes time. Each warp of a program takes
         blocks of its own, so that a multiprocessor has much in flight while a program has few
         rows; their sums are added at the end. Products of one warp's own (mma), also on Hopper.
`many`   all warps share each product; on Hopper one of four warps (wgmma, weights in registers).

On Hopper both start while the kernel in front of them ends (programmatic dependent launch).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qcompiler.backends.triton.codes import cast, decode, dot
from qcompiler.backends.triton.runtime import capability
from qcompiler.backends.triton.tune import traced

LINE = tl.constexpr(64)
"""Units of 16 bits in a line of the L2 cache."""
VARIED = ("tokens", "blocks", "part")
"""Sizes for whose values no kernel is compiled anew."""


def may_start_early(weight: Tensor) -> bool:
    """Whether a kernel on this weight can be launched so; compilers do not know such launches."""
    return not traced(weight) and capability(weight.device)[0] >= 9


@triton.jit
def _early(
    units, start, block_step, row_step,
    LANES: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Before the kernel in front is done: ask for what it does not write, the first weights of this
    program, and let the kernel behind come as early. Nothing is written or read before the wait."""
    gdc_launch_dependents()
    g, n = tl.arange(0, WARPS)[:, None, None], tl.arange(0, ROWS)[None, :, None]
    p = tl.arange(0, max(LANES // LINE, 1))[None, None, :] * LINE
    at = units + (start + g) * block_step + (tl.program_id(0) * ROWS + n) * row_step + p
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
    gdc_wait()


@triton.jit(do_not_specialize=VARIED)
def few(
    x, x_scale, units, scale, zero, bias, y,
    tokens, width, rows, padded, block_step, row_step, blocks, part,
    SPAN: tl.constexpr, SHARED: tl.constexpr, PLANES: tl.constexpr, LANES: tl.constexpr,
    KIND: tl.constexpr, ZERO: tl.constexpr, ONE: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A tile of (rows, tokens), summed over `part` blocks from program_id(2) on. Blocks of a row
    are `block_step` units apart, rows `row_step`; SPAN is a group in planes, and SHARED planes of a
    block have one scale."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    p, g = tl.arange(0, LANES), tl.arange(0, WARPS)
    start = tl.program_id(2) * part
    if EARLY:
        _early(units, start, block_step, row_step, LANES, WARPS, ROWS)
    left = units + (g * block_step)[:, None, None] + n[None, :, None] * row_step + p[None, None, :]
    token = tl.minimum(m, tokens - 1)[None, None, :] * width
    inner = (g * PLANES * LANES)[:, None, None] + p[None, :, None]
    SUM: tl.constexpr = tl.int32 if tl.int8 == DTYPE else tl.float32
    acc = tl.zeros((WARPS, ROWS, TOKENS), SUM if ONE else tl.float32)
    for block in range(start, tl.minimum(start + part, blocks), WARPS):
        inside = (block + g < blocks)[:, None]
        if EVEN:
            unit = tl.load(left + block * block_step)
        else:
            unit = tl.load(left + block * block_step, mask=inside[:, :, None], other=0)
        for first in tl.static_range(0, PLANES, SHARED):
            side = (((block + g) * PLANES + first) // SPAN * padded)[:, None] + n[None, :]
            z = 0
            if not ONE:
                s = tl.load(scale + side, mask=None if EVEN else inside, other=None if EVEN else 0)
            if ZERO:
                z = tl.load(zero + side, mask=None if EVEN else inside, other=None if EVEN else 0)
                z = z[:, :, None]
            sums = acc if ONE else tl.zeros((WARPS, ROWS, TOKENS), SUM)
            for j in tl.static_range(first, first + SHARED):
                k = (block * PLANES + j) * LANES + inner
                if EVEN:
                    a = tl.load(x + token + k)
                else:
                    a = tl.load(x + token + k, mask=k < width, other=0.0)
                sums = dot(decode(unit, z, j, KIND, ZERO, DTYPE), a, sums)
            if ONE:
                acc = sums
            else:
                acc += sums.to(tl.float32) * s.to(tl.float32)[:, :, None]
    _finish(tl.sum(acc, 0), x_scale, scale, bias, y, n, m, tokens, rows, ONE)


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
    if EARLY:
        _early(units, start, block_step, row_step, LANES, 1, ROWS)
    left = units + n[:, None] * row_step + p[None, :]
    right = x + tl.minimum(m, tokens - 1).to(tl.int64)[None, :] * width + p[:, None]
    SUM: tl.constexpr = tl.int32 if tl.int8 == DTYPE else tl.float32
    acc = tl.zeros((ROWS, TOKENS), SUM if ONE else tl.float32)
    for block in range(start, tl.minimum(start + part, blocks)):
        unit = tl.load(left + block * block_step)
        for first in tl.static_range(0, PLANES, SHARED):
            side = (block * PLANES + first) // SPAN * padded + n
            z = 0
            if ZERO:
                z = tl.load(zero + side)[:, None]
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
                acc += sums.to(tl.float32) * tl.load(scale + side).to(tl.float32)[:, None]
    _finish(acc, x_scale, scale, bias, y, n, m, tokens, rows, ONE)


@triton.jit
def _finish(acc, x_scale, scale, bias, y, n, m, tokens, rows, ONE: tl.constexpr):
    """Scales of tokens, and of rows that have one, bias and the store of a tile (rows, tokens)."""
    acc = acc.to(tl.float32)
    if x_scale is not None:
        acc *= tl.load(x_scale + m, mask=m < tokens, other=0.0)[None, :]
    if ONE:
        acc *= tl.load(scale + n).to(tl.float32)[:, None]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
    at = (tl.program_id(2).to(tl.int64) * tokens + m[None, :]) * rows + n[:, None]
    inside = (n < rows)[:, None] & (m < tokens)[None, :]
    tl.store(y + at, cast(acc, y.dtype.element_ty), mask=inside)
