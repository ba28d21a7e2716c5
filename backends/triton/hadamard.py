"""A Hadamard transform of each row, and its rounding per token, in one kernel.

    y = H x / √n,   H = H_A ⊗ H_B,   Y = H_A X H_Bᵀ  for x laid out as X (A, B)

Two small products on the tensor cores for a row: n (A + B) multiplications, not n². A is a power
of two, B a power of two times the size of a core (`qcompiler/hadamard.py`). Entries ±1 are exact in
bfloat16, and a factor that is wider goes in as the sum of two of them, right to 16 bits. Short rows
have no left factor: a tile of 16 of them is multiplied by H_Bᵀ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.backends.triton.codes import cast, dot
from qcompiler.backends.triton.operators import operator, rows_of
from qcompiler.backends.triton.rows import buffers, encode, scale_of, warps_for
from qcompiler.backends.triton.runtime import processors
from qcompiler.hadamard import core_size, hadamard

LARGEST = 256
"""Side of the largest factor."""
SHORT = 128
"""Rows up to this length have one factor."""
TILE = 16
SMALL = 8192
"""Numbers of a row up to which its factors, and the next row, have room in shared memory."""


@triton.jit
def _split(x):
    """x as the sum of two bfloat16 numbers."""
    high = cast(x, tl.bfloat16)
    return high, cast(x - high.to(tl.float32), tl.bfloat16)


@triton.jit
def _matrix(h, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """H (SIZE, SIZE) in a tile (WIDE, WIDE)."""
    i, j = tl.arange(0, WIDE)[:, None], tl.arange(0, WIDE)[None, :]
    entries = tl.load(h + i * SIZE + j, mask=(i < SIZE) & (j < SIZE), other=0)
    return entries.to(tl.float32).to(tl.bfloat16)


@triton.jit
def _times(x, h):
    """x h in float32."""
    zero = tl.zeros((x.shape[0], h.shape[1]), tl.float32)
    if x.dtype == tl.bfloat16:
        return dot(x, h, zero)
    else:
        high, low = _split(x.to(tl.float32))
        return dot(low, h, dot(high, h, zero))


@triton.jit
def _row(
    row, x, h_left, h_right, given, codes, scales, norm, inner,
    A: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr, FP8: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    i, j = tl.arange(0, A)[:, None], tl.arange(0, WIDE)[None, :]
    inside = (j < B) & (i < A)
    y = tl.load(x + row * A * B + i * B + j, mask=inside, other=0.0)
    high, low = _split(_times(y, h_right))
    y = dot(h_left, low, dot(h_left, high, tl.zeros((A, WIDE), tl.float32))) * norm
    s = scale_of(tl.max(tl.max(tl.abs(y), 1), 0), given, FP8)
    tl.store(codes + row * inner + i * B + j, encode(y, s, FP8), mask=inside)
    tail = A * B + tl.arange(0, PAD)
    none = tl.zeros((PAD,), codes.dtype.element_ty)
    tl.store(codes + row * inner + tail, none, mask=tail < inner)
    tl.store(scales + row, s)


@triton.jit
def _long(
    x, left, right, given, codes, scales, rows, norm, inner,
    A: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr, FP8: tl.constexpr, PAD: tl.constexpr,
    LOOP: tl.constexpr,
):  # fmt: skip
    """One row for each program, or one after another while the factors stay in shared memory."""
    first = tl.program_id(0).to(tl.int64)
    h_left, h_right = _matrix(left, A, A), tl.trans(_matrix(right, B, WIDE))
    if LOOP:
        for row in range(first, rows, tl.num_programs(0)):
            _row(row, x, h_left, h_right, given, codes, scales, norm, inner, A, B, WIDE, FP8, PAD)
    else:
        _row(first, x, h_left, h_right, given, codes, scales, norm, inner, A, B, WIDE, FP8, PAD)


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
    y = _times(y, tl.trans(_matrix(right, B, WIDE))) * norm
    s = scale_of(tl.max(tl.abs(y), 1), given, FP8)
    tl.store(codes + row[:, None] * inner + j, encode(y, s[:, None], FP8), mask=there & (j < inner))
    tl.store(scales + row, s, mask=row < rows)


def _shape(
    x: Tensor, left: Tensor | None, right: Tensor, given: Tensor | None, fp8: bool
) -> tuple[Tensor, Tensor]:
    return buffers(x, fp8)


@operator(_shape)
def turn_rows(
    x: Tensor, left: Tensor | None, right: Tensor, given: Tensor | None, fp8: bool
) -> tuple[Tensor, Tensor]:
    """`round_rows` of H x / √n, with H in the factors that `factors` makes."""
    codes, scales = buffers(x, fp8)
    flat = rows_of(x)
    count, width = flat.shape
    if not count:
        return codes, scales
    inner, b = codes.shape[-1], right.shape[0]
    wrap = torch.library.wrap_triton
    if left is None:
        wide = max(triton.next_power_of_2(inner), TILE)
        wrap(_short)[(triton.cdiv(count, TILE),)](
            flat, right, given, codes, scales, count, width**-0.5, inner,
            ROWS=TILE, B=b, WIDE=wide, FP8=fp8, num_warps=4,
        )  # fmt: skip
        return codes, scales
    a, wide = left.shape[0], max(triton.next_power_of_2(b), TILE)
    loop = a * wide <= SMALL
    wrap(_long)[(min(count, 4 * processors(x.device)) if loop else count,)](
        flat, left, right, given, codes, scales, count, width**-0.5, inner,
        A=a, B=b, WIDE=wide, FP8=fp8, PAD=128, LOOP=loop,
        num_warps=max(4, warps_for(a * wide)), num_stages=2 if loop else 1,
    )  # fmt: skip
    return codes, scales


def factors(n: int) -> tuple[Tensor | None, Tensor] | str:
    """H_A (None for short rows) and H_B of size n, int8; or why there are none."""
    core = core_size(n)
    if core is None:
        return f"there is no Hadamard matrix of size {n}"
    b = core
    while b < n and (n <= SHORT or b < TILE or (b * b < n and 2 * b <= LARGEST)):
        b *= 2
    a = n // b
    if a == 1 and b <= LARGEST:
        return None, _integers(b)
    if not TILE <= a <= LARGEST or b > LARGEST:
        return f"its Hadamard transform of size {n} has factors {a} and {b}"
    return _integers(a), _integers(b)


def _integers(n: int) -> Tensor:
    matrix = hadamard(n)
    assert matrix is not None
    return matrix.to(torch.int8)
