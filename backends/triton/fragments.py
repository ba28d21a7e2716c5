"""Loads that leave numbers in the threads that multiply them.

Of a tile (rows, lanes) the tensor cores (`mma`) want rows r + 8 i in the threads 4 r + c of a warp,
and of each row every fourth register: two lanes of 16 bits or four of 8. Which lanes these are is
free as long as both factors agree, so thread c takes those that 16 bytes in memory hold:

    lanes of a row   ┌── c = 0 ──┬── c = 1 ──┬── c = 2 ──┬── c = 3 ──┬── c = 0 ──┬─ …
                     │ 16 bytes  │ 16 bytes  │ 16 bytes  │ 16 bytes  │ 16 bytes  │

Tiles are loaded with the axes (c, r, warps, i, runs, lanes of a run), which triton gives to
threads in this order. What follows only says which is which: it moves no number to another thread,
so that nothing passes through shared memory and no warp waits for another. (Where a compiler
divides them in another way, results are the same, and slower.)
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def run_of(lanes, each):
    """Neighbouring lanes of a row that one thread loads at once; `each` fit a register."""
    return min(4 * each, lanes // 4)


@triton.jit
def rows_of(ROWS: tl.constexpr):
    """Rows of a tile (1, 8, 1, ROWS / 8, 1, 1)."""
    r = tl.arange(0, 8)[None, :, None, None, None, None]
    return r + 8 * tl.arange(0, ROWS // 8)[None, None, None, :, None, None]


@triton.jit
def warps_of(WARPS: tl.constexpr):
    """Warps of a tile (1, 1, WARPS, 1, 1, 1)."""
    return tl.arange(0, WARPS)[None, None, :, None, None, None]


@triton.jit
def lanes_of(LANES: tl.constexpr, EACH: tl.constexpr):
    """Lanes of a tile (4, 1, 1, 1, runs, lanes of a run)."""
    RUN: tl.constexpr = run_of(LANES, EACH)
    c = tl.arange(0, 4)[:, None, None, None, None, None]
    h = tl.arange(0, LANES // (4 * RUN))[None, None, None, None, :, None]
    return (4 * h + c) * RUN + tl.arange(0, RUN)[None, None, None, None, None, :]


@triton.jit
def factor(tile, EACH: tl.constexpr):
    """(warps, rows, lanes) of a tile, lanes in an order that all factors share."""
    W: tl.constexpr = tile.shape[2]
    R: tl.constexpr = tile.shape[3]
    H: tl.constexpr = tile.shape[4]
    RUN: tl.constexpr = tile.shape[5]
    tile = tl.reshape(tile, (4, 8, W, R, H, RUN // EACH, EACH))
    return tl.reshape(tl.permute(tile, (2, 3, 1, 4, 5, 0, 6)), (W, 8 * R, 4 * H * RUN))


@triton.jit
def beside(n):
    """Where row n has its scale: rows r and r + 8, of one thread, are neighbours (`layout.py`)."""
    return (n & -16) | ((n & 7) << 1) | ((n >> 3) & 1)


@triton.jit
def sides_of(ROWS: tl.constexpr):
    """Places of the scales of a tile of rows (4, 8, 1, ROWS / 16, 2); all c have the same."""
    r = 2 * tl.arange(0, 8)[None, :, None, None, None]
    i = 16 * tl.arange(0, ROWS // 16)[None, None, None, :, None]
    return r + i + tl.arange(0, 2)[None, None, None, None, :] + tl.zeros((4, 1, 1, 1, 1), tl.int32)


@triton.jit
def spread(side, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Scales (4, 8, warps, ROWS / 16, 2) for all columns: (warps, ROWS, OUTER · 4 · INNER)."""
    W: tl.constexpr = side.shape[2]
    R: tl.constexpr = side.shape[3]
    side = tl.reshape(tl.permute(side, (2, 3, 4, 1, 0)), (W, 16 * R, 1, 4, 1))
    side = tl.broadcast_to(side, (W, 16 * R, OUTER, 4, INNER))
    return tl.reshape(side, (W, 16 * R, OUTER * 4 * INNER))
