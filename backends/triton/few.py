"""Tiles of x Wᵀ for a few tokens, where reading the weight is what takes time.

As in `products.py`, but each warp of a program takes blocks of its own, so that a multiprocessor
has much in flight while a program has few rows; their sums are added at the end. Products are one
warp's own (mma), also on Hopper, of numbers that are loaded where they are wanted
(`fragments.py`): no warp waits for another. Of a small weight all blocks are asked for at once,
before the kernel in front is done (`WHOLE`); it is best then that programs leave half of a
multiprocessor to those of the kernel behind, which do the same. `LATE`: zero points are taken off
the sums of a group, not off each number.
"""

# Tuples grow while triton reads a kernel; of that it takes no annotation.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qcompiler.backends.triton.codes import (
    EMULATED,
    LIFT,
    decode,
    dot,
    integers,
    lifted,
)
from qcompiler.backends.triton.fragments import (
    RUN_OF_BYTES,
    factor,
    places,
    sides_of,
    spread,
)
from qcompiler.backends.triton.operators import traced
from qcompiler.backends.triton.products import VARIED, finish
from qcompiler.backends.triton.tune import Config

MOST = 64
"""Rows times blocks that a warp asks for at once: as many registers of a thread."""


def may_be_whole(rows: int, warps: int, blocks: int) -> bool:
    """Whether warps may ask at once for all blocks of so many rows."""
    return warps < blocks <= MOST // rows * warps


def few_options(config: Config, tokens: int, part: int, weight: Tensor) -> dict[str, Any]:
    """What a launch of `few` takes from its tile."""
    registers = {} if traced(weight) or not config.registers else {"maxnreg": config.registers}
    return {
        "AHEAD": part // config.warps if config.whole else config.stages,
        "WARPS": config.warps, "WHOLE": config.whole, "ALONE": tokens == 1, "LATE": config.late,
        "ORDERED": config.ordered, "num_warps": config.warps, "num_stages": 1, **registers,
    }  # fmt: skip


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


@triton.jit
def _rights(
    right, inner, block, width, TOKENS: tl.constexpr, WARPS: tl.constexpr,
    PLANES: tl.constexpr, LANES: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Activations (warps, lanes, tokens) that meet the planes of a block of each warp."""
    EACH: tl.constexpr = RUN_OF_BYTES if tl.int8 == DTYPE else 2
    found = ()
    for j in tl.static_range(PLANES):
        k = (block * PLANES + j) * LANES
        a = tl.load(right + k) if EVEN else tl.load(right + k, mask=k + inner < width, other=0.0)
        found += (tl.permute(factor(a, TOKENS, WARPS, LANES, EACH), (0, 2, 1)),)
    return found


@triton.jit
def _added(
    acc, found, rights,
    SHARED: tl.constexpr, PLANES: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr,
    ZERO: tl.constexpr, ONE: tl.constexpr, DTYPE: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """acc (warps, rows, tokens) and the products of a block of each warp, that `_fetch` found."""
    WARPS: tl.constexpr = acc.shape[0]
    ROWS: tl.constexpr = acc.shape[1]
    TOKENS: tl.constexpr = acc.shape[2]
    BYTES: tl.constexpr = tl.int8 == DTYPE
    EACH: tl.constexpr = RUN_OF_BYTES if BYTES else 2
    SUM: tl.constexpr = tl.int32 if BYTES else tl.float32
    unit, scales, zeros = found
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
    return acc


@triton.jit(do_not_specialize=VARIED)
def few(
    x, x_scale, units, scale, zero, bias, y,
    tokens, width, rows, padded, block_step, row_step, blocks, part,
    SPAN: tl.constexpr, SHARED: tl.constexpr, PLANES: tl.constexpr, LANES: tl.constexpr,
    KIND: tl.constexpr, ZERO: tl.constexpr, ONE: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr,
    AHEAD: tl.constexpr, WHOLE: tl.constexpr, ALONE: tl.constexpr, LATE: tl.constexpr,
    ORDERED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile of (rows, tokens), summed over `part` blocks from program_id(2) on. Blocks of a row
    are `block_step` units apart, rows `row_step`; SPAN is a group in planes, and SHARED planes of a
    block have one scale. AHEAD blocks of each warp are on their way while one is decoded; `WHOLE`:
    that is all of them. `ALONE`: there is one token."""
    BYTES: tl.constexpr = tl.int8 == DTYPE
    SIZE: tl.constexpr = 1 if BYTES else 2
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
    ahead = ()
    for i in tl.static_range(AHEAD):
        ahead += (
            _fetch(
                left, warp, s_at, z_at, group, start + i * WARPS, end, block_step, padded,
                SPAN, SHARED, PLANES,
            ),
        )  # fmt: skip
    if EARLY:
        gdc_wait()
    acc = tl.zeros((WARPS, ROWS, TOKENS), tl.int32 if ONE and BYTES else tl.float32)
    if WHOLE:
        for i in tl.static_range(AHEAD):
            block = start + i * WARPS
            rights = _rights(right, inner, block, width, TOKENS, WARPS, PLANES, LANES, EVEN, DTYPE)
            acc = _added(acc, ahead[i], rights, SHARED, PLANES, LANES, KIND, ZERO, ONE, DTYPE, LATE)
    else:
        for block in range(start, end, WARPS):
            first, later = ahead[0], ()
            for i in tl.static_range(1, AHEAD):
                later += (ahead[i],)
            later += (
                _fetch(
                    left, warp, s_at, z_at, group, block + AHEAD * WARPS, end, block_step, padded,
                    SPAN, SHARED, PLANES,
                ),
            )  # fmt: skip
            ahead = later
            if ORDERED and not EMULATED:
                # Else the compiler may move these loads behind what is computed, for want of
                # registers.
                tl.inline_asm_elementwise(
                    "bar.warp.sync 0xffffffff; // $0", "=r", [], dtype=tl.int32, is_pure=False,
                    pack=1,
                )  # fmt: skip
            rights = _rights(right, inner, block, width, TOKENS, WARPS, PLANES, LANES, EVEN, DTYPE)
            acc = _added(acc, first, rights, SHARED, PLANES, LANES, KIND, ZERO, ONE, DTYPE, LATE)
    m = tl.arange(0, TOKENS)
    if ALONE:  # one of the columns, which are alike: little is left for warps to add
        acc = tl.sum(tl.where(m == 0, acc, 0), 2, keep_dims=True)
        m = tl.arange(0, 1)
    n, m = n0 + tl.arange(0, ROWS), m0 + m
    finish(_together(acc), x_scale, scale, bias, y, n, m, tokens, rows, ONE, KIND)


@triton.constexpr_function
def _levels(n):
    """k of n = 2^k."""
    return n.bit_length() - 1


@triton.jit
def _together(acc):
    """Sums of all warps (warps, rows, tokens). Warps are the highest bits of a place, so that, once
    numbers have changed places, a thread holds what it adds (`tl.sum` would meet in banks)."""
    ROWS: tl.constexpr = acc.shape[1]
    TOKENS: tl.constexpr = acc.shape[2]
    y = tl.reshape(acc, (acc.shape[0] * ROWS * TOKENS,))
    for _ in tl.static_range(_levels(acc.shape[0])):
        y = tl.reshape(y, (2, y.shape[0] // 2))
        u, v = tl.split(tl.permute(y, (1, 0)))
        y = u + v
    return tl.reshape(y, (ROWS, TOKENS))
