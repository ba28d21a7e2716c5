"""y = x Wᵀ + b with 4-bit weights W = s (u - z) in groups and 16-bit activations.

Integer codes with or without zero points, and e2m1 numbers (MXFP4, NVFP4), in the layout of
`layout.py`. One token goes through `_gemv`, which multiplies and adds on the plain units in
float32; more through `_tiles`, on the tensor cores, where the weight is the left operand (it goes
from registers into the product; on Hopper only the left one can) and tokens the right one. Codes
enter the product as exact small numbers and the scale of a group multiplies its float32 sum, so
that nothing is rounded but the activation to 16 bits, if it was wider.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.backends.triton.codes import FP4, cast, dot, lift, plane, unit
from qcompiler.backends.triton.layout import PLANES
from qcompiler.backends.triton.operators import linear_shape, operator, rows_of
from qcompiler.backends.triton.split import sum_parts
from qcompiler.backends.triton.tune import Config, best, bucket


@triton.jit
def _gemv(
    x, words, scale, zero, bias, y,
    width, rows, padded, blocks, groups,
    SPAN: tl.constexpr, SHARED: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr,
    ZERO: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One token. SPAN is a group in planes; SHARED planes of a block have one scale."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, WORDS // 4), tl.float32)
    for first in range(0, blocks * LANES, WORDS):
        t = first + tl.arange(0, WORDS)
        block, lane = t // LANES, t % LANES
        at = (block * padded * LANES + lane)[None, :] + n[:, None] * LANES
        word = tl.load(words + at, mask=(block < blocks)[None, :], other=0)
        # Four neighbouring words have one scale: a thread loads it once.
        quad = (first + tl.arange(0, WORDS // 4) * 4) // LANES
        for part in tl.static_range(0, 8, SHARED):
            side = n[:, None] * groups + ((quad * 8 + part) // SPAN)[None, :]
            inside = (quad < blocks)[None, :]
            lifted = tl.zeros((WORDS,), tl.float32)
            total = tl.zeros((WORDS,), tl.float32)
            sums = tl.zeros((ROWS, WORDS), tl.float32)
            for j in tl.static_range(part, part + SHARED):
                k = block * (8 * LANES) + j * LANES + lane
                a = tl.load(x + k, mask=k < width, other=0.0).to(tl.float32)
                lifted += a * lift(j, KIND)
                total += a
                sums += plane(word, j, KIND) * (a * unit(j, KIND))[None, :]
            if ZERO:
                offset = tl.load(zero + side, mask=inside, other=0).to(tl.float32)
                quads = tl.sum(tl.reshape(sums - lifted[None, :], (ROWS, WORDS // 4, 4)), 2)
                quads -= offset * tl.sum(tl.reshape(total, (WORDS // 4, 4)), 1)[None, :]
            else:
                if KIND != FP4:
                    lifted += 8 * total
                quads = tl.sum(tl.reshape(sums - lifted[None, :], (ROWS, WORDS // 4, 4)), 2)
            acc += quads * tl.load(scale + side, mask=inside, other=0.0).to(tl.float32)
    out = tl.sum(acc, 1)
    if bias is not None:
        out += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)
    tl.store(y + n, cast(out, y.dtype.element_ty), mask=n < rows)


@triton.jit
def _tiles(
    x, words, scale, zero, bias, y,
    tokens, width, rows, padded, blocks, groups, part,
    SPAN: tl.constexpr, SHARED: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr,
    ZERO: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """A tile of (rows, tokens), summed over `part` blocks from program_id(2) on."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, LANES)
    start = tl.program_id(2) * part
    left = words + n[:, None] * LANES + lane[None, :]
    right = x + tl.minimum(m, tokens - 1)[None, :] * width + lane[:, None]
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for block in range(start, tl.minimum(start + part, blocks)):
        word = tl.load(left + block * padded * LANES)
        for first in tl.static_range(0, 8, SHARED):
            side = n * groups + (block * 8 + first) // SPAN
            s = tl.load(scale + side).to(tl.float32)
            offset = tl.load(zero + side).to(tl.float32)[:, None] if ZERO else 8.0
            sums = tl.zeros((ROWS, TOKENS), tl.float32)
            for j in tl.static_range(first, first + SHARED):
                k = (block * 8 + j) * LANES
                if EVEN:
                    a = tl.load(right + k)
                else:
                    a = tl.load(right + k, mask=k + lane[:, None] < width, other=0.0)
                w = plane(word, j, KIND)
                if KIND != FP4:
                    w = w * unit(j, KIND) - (lift(j, KIND) + offset)
                sums = dot(cast(w, DTYPE), cast(a, DTYPE), sums)
            acc += sums * s[:, None]
    inside = (n < rows)[:, None] & (m < tokens)[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
    at = tl.program_id(2).to(tl.int64) * tokens * rows + m[None, :] * rows + n[:, None]
    tl.store(y + at, cast(acc, y.dtype.element_ty), mask=inside)


@operator(lambda x, words, scale, zero, bias, group, rows, fp4: linear_shape(x, rows))
def linear_w4a16(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group: int,
    rows: int,
    fp4: bool,
) -> Tensor:
    """x (…, in) floating point; words, scale and zero as `layout.py` has them, `group` inputs with
    one scale; → (…, rows) of x's type."""
    flat = rows_of(x)
    if flat.shape[0] == 0:
        return linear_shape(x, rows)
    given = (flat, words, scale, zero, bias, group, rows, fp4)
    config = best(_key(flat, words, group), words, candidates(flat), lambda c: launch(c, *given))
    return launch(config, *given).reshape(*x.shape[:-1], rows)


def launch(
    config: Config,
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group: int,
    rows: int,
    fp4: bool,
) -> Tensor:
    (tokens, width), (blocks, padded, lanes) = x.shape, words.shape
    span = group // lanes
    shared = math.gcd(PLANES, span)
    wrap = torch.library.wrap_triton
    common = {
        "SPAN": span,
        "SHARED": shared,
        "LANES": lanes,
        "KIND": int(fp4),
        "ZERO": zero is not None,
    }
    if config.tokens == 1:
        y = x.new_empty(tokens, rows)
        wrap(_gemv)[(triton.cdiv(rows, config.rows),)](
            x, words, scale, zero, bias, y, width, rows, padded, blocks, scale.shape[1],
            ROWS=config.rows, WORDS=config.inner, **common,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return y
    split = min(config.split, blocks)
    dtype = torch.float32 if split > 1 else x.dtype
    y = x.new_empty((split, tokens, rows), dtype=dtype)
    grid = (triton.cdiv(rows, config.rows), triton.cdiv(tokens, config.tokens), split)
    wrap(_tiles)[grid](
        x, words, scale, zero, None if split > 1 else bias, y,
        tokens, width, rows, padded, blocks, scale.shape[1], triton.cdiv(blocks, split),
        EVEN=width == blocks * PLANES * lanes,
        DTYPE=tl.float16 if x.dtype == torch.float16 else tl.bfloat16,
        ROWS=config.rows, TOKENS=config.tokens, **common,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y[0] if split == 1 else sum_parts(y, bias, x.dtype)


def _key(x: Tensor, words: Tensor, group: int) -> str:
    return f"w4a16 {bucket(x.shape[0])} {tuple(words.shape)} {group} {x.dtype}"


def candidates(x: Tensor) -> list[Config]:
    """With few tokens products of one warp's own, which on Hopper too cost fewer instructions than
    those of a group of four."""
    tokens = x.shape[0]
    few = [
        Config(rows, 16 if tokens <= 16 else 32, split=split, warps=warps, stages=stages)
        for rows, split, warps, stages in (
            (64, 2, 2, 5),
            (64, 1, 2, 6),
            (64, 4, 2, 4),
            (32, 1, 2, 6),
            (32, 2, 2, 5),
            (64, 4, 4, 4),
        )
    ]
    if tokens == 1:
        shapes = ((8, 512, 4), (16, 512, 4), (4, 512, 4), (8, 256, 2), (16, 256, 2))
        return [Config(r, inner=n, warps=w, stages=2) for r, n, w in shapes] + few[:2]
    if tokens <= 32:
        return few
    if tokens <= 64:
        return [
            Config(64, 64, split=2, stages=4),
            Config(128, 64, stages=4),
            Config(128, 64, split=4),
        ]
    return [
        Config(128, 128, warps=8, stages=3),
        Config(64, 128, warps=4, stages=4),
    ]
