"""A Hadamard transform of each row, and its rounding per token, in one kernel.

    y = H x / √n,   H = H_2 ⊗ … ⊗ H_2 ⊗ H_M ⊗ H_B,   x laid out as blocks X (M, B)

H_M X H_Bᵀ is two products on the tensor cores. Entries ±1 are exact in bfloat16; an input that is
wider goes in as the sum of two of them, right to 16 bits, and so does what the first product leaves
in the registers of a thread, where the second takes it. What is left, u + v and u - v of blocks, is
each thread's own too: no number changes places. Rows and columns come out in such an order that the
codes of a thread are neighbours in memory. A block may hold several short rows, I ⊗ H_A for H_M;
rows up to 256 long may be multiplied by the whole matrix, sixteen at a time.
"""

# Tuples grow while triton reads a kernel; of that it takes no annotation.
# mypy: disable-error-code="assignment, misc"

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
SIDE = 256
"""Of the largest H_B; rows up to this length may be multiplied by the whole matrix."""
BLOCK = 64
"""M; twice that for rows which four warps do not hold."""
HELD = 16384
"""Numbers of a row, with the columns that B is padded with, that the registers of four warps hold;
of eight twice as many."""
STAGES = 3
"""Rows on their way from memory, and the one that is turned."""


@triton.jit
def _parts(x):
    """Two numbers of bfloat16 whose sum has 16 bits of x."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return cast(high, tl.bfloat16), cast(x - high, tl.bfloat16)


@triton.jit
def _from_left(h, x):
    """h x in float32."""
    zero = tl.zeros((h.shape[0], x.shape[1]), tl.float32)
    if x.dtype == tl.bfloat16:
        return dot(h, x, zero)
    else:
        high, low = _parts(x.to(tl.float32))
        return dot(h, high, dot(h, low, zero))


@triton.jit
def _from_right(x, h):
    """x h in float32."""
    zero = tl.zeros((x.shape[0], h.shape[1]), tl.float32)
    if x.dtype == tl.bfloat16:
        return dot(x, h, zero)
    else:
        high, low = _parts(x.to(tl.float32))
        return dot(low, h, dot(high, h, zero))


@triton.jit
def _odd(bits):
    """Whether so many bits (of seven) are set, 0 or 1."""
    bits ^= bits >> 4
    bits ^= bits >> 2
    return (bits ^ (bits >> 1)) & 1


@triton.jit
def _row(m, M: tl.constexpr):
    """The row of a block that row m of a product is: the tensor cores give a thread m and m + 8 of
    sixteen, and these are half a block apart."""
    return m // 8 % 2 * (M // 2) + m // 16 * 8 + m % 8


@triton.jit
def _column(n, WIDE: tl.constexpr):
    """The column that column n of a product is: the tensor cores give a thread two of eight, and
    all its columns are neighbours."""
    return n // 2 % 4 * (WIDE // 4) + n // 8 * 2 + n % 2


@triton.jit
def _neighbours(y):
    """A product (M, WIDE) as (4 M, WIDE / 4), row after row."""
    M: tl.constexpr = y.shape[0]
    WIDE: tl.constexpr = y.shape[1]
    y = tl.reshape(y, (M // 16, 2, 8, WIDE // 8, 4, 2))
    return tl.reshape(tl.permute(y, (1, 0, 2, 4, 3, 5)), (4 * M, WIDE // 4))


@triton.jit
def _left(M: tl.constexpr, A: tl.constexpr):
    """I ⊗ H_A (M, M), H_A a product of H_2, its rows as `_row` has them."""
    i, k = _row(tl.arange(0, M), M)[:, None], tl.arange(0, M)[None, :]
    one: tl.constexpr = 0x3F80
    bits = tl.where(i // A == k // A, (_odd((i & k) % A) << 15) | one, 0)
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _right(h, SIZE: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr):
    """H_Bᵀ (WIDE, WIDE) made of h, H_SIZE, its columns as `_column` has them."""
    c, j = _column(tl.arange(0, WIDE), WIDE)[None, :], tl.arange(0, WIDE)[:, None]
    entries = tl.load(h + c % SIZE * SIZE + j % SIZE, mask=(c < B) & (j < B), other=0)
    entries = tl.where(_odd((c // SIZE) & (j // SIZE)) == 1, -entries, entries)
    return entries.to(tl.float32).to(tl.bfloat16)


@triton.constexpr_function
def _levels(n):
    """k of n = 2^k."""
    return n.bit_length() - 1


@triton.jit
def _butterflies(blocks):
    """(u + v, u - v) of all pairs of blocks, at every distance."""
    for level in tl.static_range(_levels(len(blocks))):
        made = ()
        for r in tl.static_range(len(blocks)):
            if r >> level & 1:
                made += (blocks[r - (1 << level)] - blocks[r],)
            else:
                made += (blocks[r] + blocks[r + (1 << level)],)
        blocks = made
    return blocks


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
def _scales_of(blocks, norm, given, EACH: tl.constexpr, FP8: tl.constexpr):
    """One for each of the EACH rows of a block, and what numbers of a product are in its units:
    (EACH,) and (M, 1), or numbers for one row."""
    most = tl.abs(blocks[0])
    for r in tl.static_range(1, len(blocks)):
        most = tl.maximum(most, tl.abs(blocks[r]))
    most = tl.max(most, 1)
    if EACH == 1:
        s = scale_of(tl.max(most, 0) * norm, given, FP8)
        return s, norm / s
    else:
        M: tl.constexpr = most.shape[0]
        most = tl.permute(tl.reshape(most, (M // 16, 2, 8)), (1, 0, 2))
        s = scale_of(tl.max(tl.reshape(most, (EACH, M // EACH)), 1) * norm, given, FP8)
        unit = tl.broadcast_to((norm / s)[:, None], (EACH, M // EACH))
        unit = tl.permute(tl.reshape(unit, (2, M // 16, 8)), (1, 0, 2))
        return s, tl.reshape(unit, (M, 1))


@triton.jit(do_not_specialize=["rows"])
def _long(
    x, right, given, codes, scales, rows, norm, inner,
    A: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr,
    BLOCKS: tl.constexpr, EACH: tl.constexpr, FP8: tl.constexpr, PAD: tl.constexpr,
    STAGES: tl.constexpr, PREFETCH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Rows of A · B = BLOCKS · M · B numbers, or EACH of them in a block, one after the other."""
    N: tl.constexpr = A * B
    left, core = _left(M, A if EACH > 1 else M), _right(right, SIZE, B, WIDE)
    i, j = tl.arange(0, M)[:, None], tl.arange(0, WIDE)[None, :]
    q = tl.arange(0, 4 * M)[:, None]
    c = q % 4 * (WIDE // 4) + tl.arange(0, WIDE // 4)[None, :]
    each = tl.arange(0, EACH)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * EACH
    step = tl.num_programs(0).to(tl.int64) * EACH
    groups = tl.cdiv(rows, EACH)
    for _ in tl.range(tl.program_id(0), groups, tl.num_programs(0), num_stages=STAGES):
        if PREFETCH:
            _prefetch(x + tl.minimum(row + step, rows - 1) * N, N)
        blocks = ()
        for r in tl.static_range(BLOCKS):
            at = x + row * N + r * M * B + (i * B + j)
            if EACH > 1:
                y = tl.load(at, mask=(j < B) & (row + i // A < rows), other=0.0)
            elif B < WIDE:
                y = tl.load(at, mask=j < B, other=0.0)
            else:
                y = tl.load(at)
            blocks += (_from_left(left, y),)
        blocks, turned = _butterflies(blocks), ()
        for r in tl.static_range(BLOCKS):
            turned += (_from_right(blocks[r], core),)
        s, unit = _scales_of(turned, norm, given, EACH, FP8)
        for r in tl.static_range(BLOCKS):
            y = turned[r] * unit
            y = _neighbours(encode(y, y, given is None, FP8))
            if EACH > 1:
                own = row + q // 4 // A
                tl.store(codes + own * inner + q // 4 % A * B + c, y, mask=(c < B) & (own < rows))
            elif B < WIDE:
                tl.store(codes + row * inner + r * M * B + (q // 4 * B + c), y, mask=c < B)
            else:
                tl.store(codes + row * inner + r * M * B + (q // 4 * B + c), y)
        tail = N + tl.arange(0, PAD)[None, :]
        ends = codes + (row + each)[:, None] * inner + tail
        zeros = tl.zeros((EACH, PAD), codes.dtype.element_ty)
        tl.store(ends, zeros, mask=(tail < inner) & (row + each < rows)[:, None])
        if EACH > 1:
            tl.store(scales + row + each, s, mask=row + each < rows)
        else:
            tl.store(scales + row, s)
        row += step


@triton.jit(do_not_specialize=["rows"])
def _short(
    x, right, given, codes, scales, rows, norm, inner,
    ROWS: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """A tile of rows for each program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i, j = tl.arange(0, WIDE)[:, None], tl.arange(0, WIDE)[None, :]
    there = row[:, None] < rows
    h = tl.load(right + j * B + i, mask=(i < B) & (j < B), other=0).to(tl.float32).to(tl.bfloat16)
    y = tl.load(x + row[:, None] * B + j, mask=there & (j < B), other=0.0)
    y = _from_right(y, h) * norm
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
    inner, size = codes.shape[-1], right.shape[0]
    wrap = torch.library.wrap_triton
    given_to = (flat, right, given, codes, scales, count, width**-0.5, inner)
    if size == width:
        wide = max(triton.next_power_of_2(inner), TILE)
        wrap(_short)[(triton.cdiv(count, TILE),)](
            *given_to, ROWS=TILE, B=size, WIDE=wide, FP8=fp8, num_warps=4
        )
        return codes, scales
    b, m, resident = _division(width, size, count)
    a, wide = width // b, triton.next_power_of_2(b)
    each = max(m // a, 1)
    groups, at_once = triton.cdiv(count, each), resident * processors(x.device)
    looped = groups > at_once
    wrap(_long)[(min(groups, at_once),)](
        *given_to, A=a, SIZE=size, B=b, WIDE=wide, M=m, BLOCKS=max(a // m, 1), EACH=each, FP8=fp8,
        PAD=128, STAGES=STAGES if looped and m == BLOCK else 1, PREFETCH=looped and m > BLOCK,
        num_warps=m // TILE, num_stages=1, **early(x),
    )  # fmt: skip
    return codes, scales


def _division(width: int, size: int, count: int) -> tuple[int, int, int]:
    """B, M, and programs of a multiprocessor, for so many rows of n and H_B made of H_`size`. Few
    rows are done sooner in larger products, many in programs that take few registers."""
    padded = width // size * triton.next_power_of_2(size)
    few, b = count <= BLOCK, size
    while (few or padded > HELD) and 2 * b <= 2 * WIDE and width // b > BLOCK:
        b *= 2
    large = padded > (HELD // 2 if few else HELD) and width // b > BLOCK
    m = 2 * BLOCK if large else BLOCK
    registers = padded // (2 * m)  # numbers of a row in a thread
    return b, m, 4 if registers <= 32 else 3 if registers <= 64 else 2


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
    if small or b > SIDE or n // b * triton.next_power_of_2(b) > 2 * HELD:
        return f"its Hadamard transform of size {n} has factors {n // b} and {b}"
    matrix = hadamard(b)
    assert matrix is not None
    return matrix.to(torch.int8)
