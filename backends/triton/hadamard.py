"""A Hadamard transform of each row, and its rounding per token, in one kernel.

    y = H x / √n,   H = H_2 ⊗ … ⊗ H_2 ⊗ H_B,   x laid out as X (A, B), A a power of two

X H_Bᵀ is a small product on the tensor cores: entries ±1 are exact in bfloat16, and an input that
is wider goes in as the sum of two of them, right to 16 bits. B is the size of a core
(`qcompiler/hadamard.py`) times a power of two, some 32. The rest are butterflies, u + v and u - v,
between rows of X: first those that one thread holds both after the product; then numbers change
places, once, so that threads hold both of the others. Short rows have no butterflies: a tile of 16
of them is multiplied by H_nᵀ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qcompiler.backends.triton.codes import EMULATED, cast, dot
from qcompiler.backends.triton.operators import early, operator, rows_of
from qcompiler.backends.triton.rows import buffers, encode, scale_of
from qcompiler.backends.triton.runtime import processors
from qcompiler.hadamard import core_size, hadamard

LINE = tl.constexpr(64)
"""Numbers of 16 bits in a line of the L2 cache."""
WIDE = 32
"""What B is made from a smaller core."""
TILE = 16
"""Sides of a product on the tensor cores are at least so long."""
FEW = 4
"""Programs that may start early."""
PROGRAMS = 4
"""On each multiprocessor, where each has row after row."""
SIDE = 256
"""Of the largest H_B; rows up to this length may be multiplied by the whole matrix."""
LARGEST = 32768
"""Numbers of a row, with the columns that B is padded with, that registers hold."""


@triton.jit
def _matrix(h, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Hᵀ (SIZE, SIZE) in a tile (WIDE, WIDE)."""
    i, j = tl.arange(0, WIDE)[:, None], tl.arange(0, WIDE)[None, :]
    entries = tl.load(h + i * SIZE + j, mask=(i < SIZE) & (j < SIZE), other=0)
    return tl.trans(entries.to(tl.float32).to(tl.bfloat16))


@triton.jit
def _times(x, h):
    """x h in float32."""
    zero = tl.zeros((x.shape[0], h.shape[1]), tl.float32)
    if x.dtype == tl.bfloat16:
        return dot(x, h, zero)
    else:
        x = x.to(tl.float32)
        high = cast(x, tl.bfloat16)
        low = cast(x - high.to(tl.float32), tl.bfloat16)
        return dot(low, h, dot(high, h, zero))


@triton.jit
def _butterflies(y, STRIDE: tl.constexpr, LEVELS: tl.constexpr):
    """(u + v, u - v) for all pairs of numbers STRIDE apart in y, then STRIDE / 2, …"""
    for i in tl.static_range(LEVELS):
        pairs = tl.reshape(y, (y.shape[0] // (STRIDE >> i) // 2, 2, STRIDE >> i))
        u, v = tl.split(tl.permute(pairs, (0, 2, 1)))
        y = tl.reshape(tl.permute(tl.join(u + v, u - v), (0, 2, 1)), (y.shape[0],))
    return y


@triton.jit
def _prefetch(row, SIZE: tl.constexpr):
    """Has a row of 16-bit numbers fetched from memory into the L2 cache."""
    at = row + tl.arange(0, triton.next_power_of_2(SIZE // LINE)) * LINE % SIZE
    if not EMULATED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _turn(
    x, matrix, given, codes, scales, norm, inner,
    A: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr, FP8: tl.constexpr, PAD: tl.constexpr,
    WARPS: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """A row of A · B; A = 2^OUTER · 2^WARPS · 2 · 8, from far to near: what the product leaves in a
    thread, in the warps, in a thread, and in the lanes of a warp."""
    N: tl.constexpr = A * WIDE
    i, j = tl.arange(0, A)[:, None], tl.arange(0, WIDE)[None, :]
    y = tl.load(x + i * B + j, mask=j < B, other=0.0)
    y = tl.reshape(_times(y, matrix), (N,))
    y = _butterflies(y, N // 2, OUTER)
    y = _butterflies(y, 8 * WIDE, 1)
    # Threads hold what differs in the highest bits of a place; with neighbours among it, codes are
    # stored in pairs.
    y = tl.reshape(y, (1 << OUTER, 1 << WARPS, 2, 8, WIDE // 2, 2))
    y = tl.reshape(tl.permute(y, (1, 3, 5, 0, 2, 4)), (N,))
    y = _butterflies(y, N // 2, WARPS + 3)
    s = scale_of(tl.max(tl.abs(y), 0) * norm, given, FP8)
    y *= norm / s
    q = encode(y, y, given is None, FP8)
    q = tl.reshape(q, (1 << WARPS, 8, 2, 1 << OUTER, 2, WIDE // 2))
    q = tl.reshape(tl.permute(q, (3, 0, 4, 1, 5, 2)), (A, WIDE))
    tl.store(codes + i * B + j, q, mask=j < B)
    tail = A * B + tl.arange(0, PAD)
    tl.store(codes + tail, tl.zeros((PAD,), codes.dtype.element_ty), mask=tail < inner)
    tl.store(scales, s)


@triton.jit
def _long(
    x, right, given, codes, scales, rows, norm, inner,
    A: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr, FP8: tl.constexpr, PAD: tl.constexpr,
    WARPS: tl.constexpr, OUTER: tl.constexpr, LOOP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row, or, if few programs fit a multiprocessor, row after row, the next on its way from
    memory while one is turned."""
    matrix = _matrix(right, B, WIDE)
    first = tl.program_id(0).to(tl.int64)
    x += first * A * B
    codes += first * inner
    scales += first
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    if LOOP:
        step = tl.num_programs(0).to(tl.int64)
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            if row + step < rows:
                _prefetch(x + step * A * B, A * B)
            _turn(x, matrix, given, codes, scales, norm, inner, A, B, WIDE, FP8, PAD, WARPS, OUTER)
            x += step * A * B
            codes += step * inner
            scales += step
    else:
        _turn(x, matrix, given, codes, scales, norm, inner, A, B, WIDE, FP8, PAD, WARPS, OUTER)


@triton.jit
def _short(
    x, right, given, codes, scales, rows, norm, inner,
    ROWS: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """A tile of rows for each program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, WIDE)[None, :]
    there = row[:, None] < rows
    y = tl.load(x + row[:, None] * B + j, mask=there & (j < B), other=0.0)
    y = _times(y, _matrix(right, B, WIDE)) * norm
    s = scale_of(tl.max(tl.abs(y), 1), given, FP8)
    y *= (1.0 / s)[:, None]
    q = encode(y, y, given is None, FP8)
    tl.store(codes + row[:, None] * inner + j, q, mask=there & (j < inner))
    tl.store(scales + row, s, mask=row < rows)


def _shape(x: Tensor, right: Tensor, given: Tensor | None, fp8: bool) -> tuple[Tensor, Tensor]:
    return buffers(x, fp8)


@operator(_shape)
def turn_rows(x: Tensor, right: Tensor, given: Tensor | None, fp8: bool) -> tuple[Tensor, Tensor]:
    """`round_rows` of H x / √n, with the H_B that `factor` makes."""
    codes, scales = buffers(x, fp8)
    flat = rows_of(x)
    count, width = flat.shape
    if not count:
        return codes, scales
    inner, b = codes.shape[-1], right.shape[0]
    wrap = torch.library.wrap_triton
    if b == width:
        wide = max(triton.next_power_of_2(inner), TILE)
        wrap(_short)[(triton.cdiv(count, TILE),)](
            flat, right, given, codes, scales, count, width**-0.5, inner,
            ROWS=TILE, B=b, WIDE=wide, FP8=fp8, num_warps=4,
        )  # fmt: skip
        return codes, scales
    a, wide = width // b, triton.next_power_of_2(b)
    large = a * wide >= LARGEST // 2
    warps = 8 if wide > 2 * WIDE or a * wide > LARGEST // 2 or (large and count < 64) else 4
    divided = min(warps, a // TILE)
    programs = min(count, PROGRAMS * processors(x.device)) if large else count
    wrap(_long)[(programs,)](
        flat, right, given, codes, scales, count, width**-0.5, inner,
        A=a, B=b, WIDE=wide, FP8=fp8, PAD=128, WARPS=_log(divided),
        OUTER=_log(a // (TILE * divided)), LOOP=programs < count, num_warps=warps, num_stages=1,
        # Many let the kernel behind them come early, and do not themselves: as they waited, their
        # shared memory and registers would keep others from as many multiprocessors.
        **(early(x) if programs <= FEW else {"EARLY": early(x)["EARLY"]}),
    )  # fmt: skip
    return codes, scales


def _log(n: int) -> int:
    """k of n = 2^k."""
    return n.bit_length() - 1


def factor(n: int) -> Tensor | str:
    """H_B for rows of n, int8, or why they have none."""
    b = core_size(n)
    if b is None:
        return f"there is no Hadamard matrix of size {n}"
    while 2 * b <= WIDE and n >= 2 * b * TILE:
        b *= 2
    small = b < TILE or n < b * TILE
    if small and n <= SIDE:
        b, small = n, False
    if small or b > SIDE or n // b * triton.next_power_of_2(b) > LARGEST:
        return f"its Hadamard transform of size {n} has factors {n // b} and {b}"
    matrix = hadamard(b)
    assert matrix is not None
    return matrix.to(torch.int8)
