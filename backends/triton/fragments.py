"""Loads that leave numbers in the threads that multiply them.

Of a tile (rows, lanes) the tensor cores (`mma`) want rows r + 8 i in the threads 4 r + c of a warp,
and of each row every fourth run of EACH lanes. Which lanes these are is free as long as both
factors agree, so thread c takes those that 16 bytes in memory hold:

    lanes of a row   ┌── c = 0 ──┬── c = 1 ──┬── c = 2 ──┬── c = 3 ──┬── c = 0 ──┬─ …
                     │ 16 bytes  │ 16 bytes  │ 16 bytes  │ 16 bytes  │ 16 bytes  │

A tile is loaded as (n, lanes of a run), n = (i, run, warp, r, c): triton gives neighbouring n to
neighbouring threads. What follows only says which is which: it moves no number to another thread,
so that nothing passes through shared memory and no warp waits for another. (Where a compiler
divides them in another way, results are the same, and slower.)
"""

from __future__ import annotations

import triton
import triton.language as tl

VERSION = tuple(int(n) for n in triton.__version__.split(".")[:2])
RUN_OF_BYTES = tl.constexpr(8 if VERSION < (3, 8) else 4)
"""Neighbours of 8 bits that triton gives a thread if it finds that they came in words."""


@triton.constexpr_function
def run_of(lanes, size):
    """Neighbouring lanes of a row, of `size` bytes, that one thread loads at once."""
    return min(16 // size, lanes // 4)


@triton.jit
def places(ROWS: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr):
    """Rows and warps (n, 1) and lanes (n, lanes of a run) of a tile."""
    RUN: tl.constexpr = run_of(LANES, SIZE)
    RUNS: tl.constexpr = LANES // (4 * RUN)
    n = tl.arange(0, ROWS * 4 * WARPS * RUNS)[:, None]
    row = n // 4 % 8 + n // (32 * WARPS * RUNS) * 8
    run = n // (32 * WARPS) % RUNS * 4 + n % 4
    return row, n // 32 % WARPS, run * RUN + tl.arange(0, RUN)[None, :]


@triton.jit
def factor(tile, ROWS: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr):
    """(warps, rows, lanes) of a tile, lanes in an order that all factors share; EACH is 2 for lanes
    of 16 bits, RUN_OF_BYTES for those of 8."""
    RUN: tl.constexpr = tile.shape[1]
    tile = tl.reshape(tile, (ROWS // 8, LANES // (4 * RUN), WARPS, 8, 4, RUN // EACH, EACH))
    return tl.reshape(tl.permute(tile, (2, 0, 3, 1, 5, 4, 6)), (WARPS, ROWS, LANES))


@triton.jit
def beside(n):
    """Where row n has its scale: rows r and r + 8, of one thread, are neighbours (`layout.py`)."""
    return (n & -16) | ((n & 7) << 1) | ((n >> 3) & 1)


@triton.jit
def sides_of(ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Places of scales of a tile of rows (n, 2), n = (i, warp, r, c), and their warps (n, 1)."""
    n = tl.arange(0, ROWS * 2 * WARPS)[:, None]
    row = n // (32 * WARPS) * 16 + n // 4 % 8 * 2
    return row + tl.arange(0, 2)[None, :], n // 32 % WARPS


@triton.jit
def spread(side, ROWS: tl.constexpr, WARPS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Scales (n, 2) for all columns: (warps, ROWS, OUTER · 4 · INNER)."""
    side = tl.permute(tl.reshape(side, (ROWS // 16, WARPS, 8, 4, 2)), (1, 0, 4, 2, 3))
    side = tl.reshape(side, (WARPS, ROWS, 1, 4, 1))
    side = tl.broadcast_to(side, (WARPS, ROWS, OUTER, 4, INNER))
    return tl.reshape(side, (WARPS, ROWS, OUTER * 4 * INNER))
