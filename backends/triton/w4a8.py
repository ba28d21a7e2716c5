"""y = s_x Σ_groups s_w (q_x (u - z)ᵀ) + b: 4-bit weights made int8 in registers, int8 activations.

The sum of a group is exact, in int32; scales multiply it in float32. Weights lie as `layout.py`
says, with 32 lanes (what one product of int8 sums over); they are the left operand.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.backends.triton.codes import cast
from qcompiler.backends.triton.layout import PLANES
from qcompiler.backends.triton.operators import operator, rows_of
from qcompiler.backends.triton.split import sum_parts
from qcompiler.backends.triton.tune import Config, best, bucket

LANES = 32
TOPS = tl.constexpr(-0x7F7F7F80)
"""0x80808080, the highest bit of each byte."""


@triton.jit
def _tiles(
    x, x_scale, words, scale, zero, bias, y, tokens, inner, rows, padded, blocks, groups, part,
    SPAN: tl.constexpr, SHARED: tl.constexpr, LANES: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A tile of (rows, tokens), summed over `part` blocks from program_id(2) on."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, LANES)
    start = tl.program_id(2) * part
    left = words + n[:, None] * LANES + lane[None, :]
    right = x + tl.minimum(m, tokens - 1).to(tl.int64)[None, :] * inner + lane[:, None]
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for block in range(start, tl.minimum(start + part, blocks)):
        word = tl.load(left + block * padded * LANES)
        for first in tl.static_range(0, 8, SHARED):
            side = n * groups + (block * 8 + first) // SPAN
            if zero is not None:
                offset = tl.load(zero + side).to(tl.int32)[:, None] * 0x01010101
            else:
                offset = 0x08080808
            sums = tl.zeros((ROWS, TOKENS), tl.int32)
            for j in tl.static_range(first, first + SHARED):
                k = (block * 8 + j) * LANES
                if EVEN:
                    a = tl.load(right + k)
                else:
                    a = tl.load(right + k, mask=k + lane[:, None] < inner, other=0)
                # Four codes in bytes: 128 + u - z cannot borrow from its neighbour.
                four = ((((word >> (4 * (j % 2))) & 0x0F0F0F0F) | TOPS) - offset) ^ TOPS
                sums = tl.dot((four >> (8 * (j // 2))).to(tl.int8), a, sums, out_dtype=tl.int32)
            acc += sums.to(tl.float32) * tl.load(scale + side).to(tl.float32)[:, None]
    acc *= tl.load(x_scale + m, mask=m < tokens, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
    at = (tl.program_id(2).to(tl.int64) * tokens + m[None, :]) * rows + n[:, None]
    inside = (n < rows)[:, None] & (m < tokens)[None, :]
    tl.store(y + at, cast(acc, y.dtype.element_ty), mask=inside)


def _shape(
    x: Tensor, x_scale: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None,
    bias: Tensor | None, group: int, rows: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], rows), dtype=dtype)


@operator(_shape)
def linear_w4a8(
    x: Tensor, x_scale: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None,
    bias: Tensor | None, group: int, rows: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """int8 codes x (…, padded inputs) with scales (…, 1) as `round_rows` makes them; words, scale
    and zero (whole numbers) as `layout.py` has them → (…, rows) of `dtype`."""
    flat = rows_of(x)
    if flat.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], rows), dtype=dtype)
    given = (flat, x_scale, words, scale, zero, bias, group, rows, dtype)
    key = f"w4a8 {bucket(flat.shape[0])} {tuple(words.shape)} {group} {dtype}"
    config = best(key, words, candidates(flat), lambda c: launch(c, *given))
    return launch(config, *given).reshape(*x.shape[:-1], rows)


def launch(
    config: Config, x: Tensor, x_scale: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None,
    bias: Tensor | None, group: int, rows: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    (tokens, inner), (blocks, padded, lanes) = x.shape, words.shape
    split = min(config.split, blocks)
    y = x.new_empty((split, tokens, rows), dtype=torch.float32 if split > 1 else dtype)
    grid = (triton.cdiv(rows, config.rows), triton.cdiv(tokens, config.tokens), split)
    torch.library.wrap_triton(_tiles)[grid](
        x, x_scale, words, scale, zero, None if split > 1 else bias, y,
        tokens, inner, rows, padded, blocks, scale.shape[1], triton.cdiv(blocks, split),
        SPAN=group // lanes, SHARED=math.gcd(PLANES, group // lanes), LANES=lanes,
        EVEN=inner == blocks * PLANES * lanes, ROWS=config.rows, TOKENS=config.tokens,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y[0] if split == 1 else sum_parts(y, bias, dtype)


def candidates(x: Tensor) -> list[Config]:
    tokens = x.shape[0]
    if tokens <= 64:
        wide = 16 if tokens <= 16 else 64
        return [
            Config(rows, wide, split=split, warps=warps, stages=4)
            for rows, split, warps in ((64, 4, 2), (64, 1, 2), (64, 1, 4), (32, 2, 2))
        ]
    return [Config(128, 128, warps=8, stages=3), Config(64, 128, warps=4, stages=4)]
