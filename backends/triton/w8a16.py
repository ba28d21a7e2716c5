"""y = x Wᵀ + b with 8-bit weights, int8 (q - z) s or e4m3, per row or in groups, and 16-bit
activations.

As in `w4a16.py`: one token on the plain units in float32, more on the tensor cores, codes as exact
numbers of 16 bits, and the scale of a group times its float32 sum.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.backends.triton.codes import cast, dot
from qcompiler.backends.triton.layout import INNER
from qcompiler.backends.triton.operators import linear_shape, operator, rows_of
from qcompiler.backends.triton.split import sum_parts
from qcompiler.backends.triton.tune import Config, best, bucket


@triton.jit
def number(code, FP8: tl.constexpr):
    """What a code stands for, float32. The fields of e4m3 are put in those of float32, whose
    exponent is biased by 120 more."""
    if FP8:
        u = code.to(tl.int32)
        bits = ((u & 0x7F) << 20) | ((u & 0x80) << 24)
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return code.to(tl.float32)


@triton.jit
def _gemv(
    x, weight, scale, zero, bias, y, width, inner, rows, groups,
    GROUP: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One token; GROUP is 0 for one scale a row."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, STEP), tl.float32)
    for first in range(0, inner, STEP):
        k = first + tl.arange(0, STEP)
        at = n.to(tl.int64)[:, None] * inner + k[None, :]
        w = number(tl.load(weight + at, mask=(k < inner)[None, :], other=0), FP8)
        side = n[:, None] * groups
        if GROUP:
            side += (k // GROUP)[None, :]
        if zero is not None:
            w -= tl.load(zero + side, mask=(k < inner)[None, :], other=0).to(tl.float32)
        if GROUP:
            w *= tl.load(scale + side, mask=(k < inner)[None, :], other=0.0).to(tl.float32)
        acc += w * tl.load(x + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
    out = tl.sum(acc, 1)
    if not GROUP:
        out *= tl.load(scale + n * groups).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)
    tl.store(y + n, cast(out, y.dtype.element_ty), mask=n < rows)


@triton.jit
def _tiles(
    x, weight, scale, zero, bias, y, tokens, width, inner, rows, groups, part,
    GROUP: tl.constexpr, FP8: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A tile of (rows, tokens), summed over `part` inputs from program_id(2) on."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, STEP)
    start = tl.program_id(2) * part
    left = weight + n.to(tl.int64)[:, None] * inner + k[None, :]
    right = x + tl.minimum(m, tokens - 1).to(tl.int64)[None, :] * width + k[:, None]
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(start, tl.minimum(start + part, inner), STEP):
        w = number(tl.load(left + first), FP8)
        side = n * groups + (first // GROUP if GROUP else 0)
        if zero is not None:
            w -= tl.load(zero + side).to(tl.float32)[:, None]
        if EVEN:
            a = tl.load(right + first)
        else:
            a = tl.load(right + first, mask=first + k[:, None] < width, other=0.0)
        sums = dot(cast(w, DTYPE), cast(a, DTYPE), tl.zeros((ROWS, TOKENS), tl.float32))
        acc += sums * tl.load(scale + side).to(tl.float32)[:, None]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
    at = (tl.program_id(2).to(tl.int64) * tokens + m[None, :]) * rows + n[:, None]
    inside = (n < rows)[:, None] & (m < tokens)[None, :]
    tl.store(y + at, cast(acc, y.dtype.element_ty), mask=inside)


@operator(lambda x, weight, scale, zero, bias, group, rows: linear_shape(x, rows))
def linear_w8a16(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    group: int, rows: int,
) -> Tensor:  # fmt: skip
    """x (…, in) floating point; weight (padded rows, padded inputs) int8, or e4m3 bits in uint8;
    scale and zero (padded rows, groups), `group` inputs with one scale, 0 for one a row → (…, rows)
    of x's type."""
    flat = rows_of(x)
    if flat.shape[0] == 0:
        return linear_shape(x, rows)
    given = (flat, weight, scale, zero, bias, group, rows)
    key = f"w8a16 {bucket(flat.shape[0])} {tuple(weight.shape)} {weight.dtype} {group} {x.dtype}"
    config = best(key, weight, candidates(flat), lambda c: launch(c, *given))
    return launch(config, *given).reshape(*x.shape[:-1], rows)


def launch(
    config: Config, x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None,
    bias: Tensor | None, group: int, rows: int,
) -> Tensor:  # fmt: skip
    (tokens, width), inner = x.shape, weight.shape[1]
    wrap = torch.library.wrap_triton
    options = {"GROUP": group, "FP8": weight.dtype == torch.uint8, "ROWS": config.rows}
    launch = {"num_warps": config.warps, "num_stages": config.stages}
    if config.tokens == 1:
        y = x.new_empty(tokens, rows)
        wrap(_gemv)[(triton.cdiv(rows, config.rows),)](
            x, weight, scale, zero, bias, y, width, inner, rows, scale.shape[1],
            STEP=config.inner, **options, **launch,
        )  # fmt: skip
        return y
    step = math.gcd(group, INNER) if group else INNER
    steps = triton.cdiv(inner, step)
    split = min(config.split, steps)
    y = x.new_empty((split, tokens, rows), dtype=torch.float32 if split > 1 else x.dtype)
    grid = (triton.cdiv(rows, config.rows), triton.cdiv(tokens, config.tokens), split)
    wrap(_tiles)[grid](
        x, weight, scale, zero, None if split > 1 else bias, y,
        tokens, width, inner, rows, scale.shape[1], triton.cdiv(steps, split) * step,
        EVEN=width == inner, DTYPE=tl.float16 if x.dtype == torch.float16 else tl.bfloat16,
        TOKENS=config.tokens, STEP=step, **options, **launch,
    )  # fmt: skip
    return y[0] if split == 1 else sum_parts(y, bias, x.dtype)


def candidates(x: Tensor) -> list[Config]:
    tokens = x.shape[0]
    if tokens == 1:
        return [
            Config(4, inner=2048),
            Config(8, inner=1024),
            Config(2, inner=2048),
            Config(4, inner=1024, warps=2),
        ]
    if tokens <= 64:
        wide = 16 if tokens <= 16 else 64
        return [
            Config(64, wide, split=4, stages=4),
            Config(64, wide, stages=5),
            Config(128, wide, stages=4),
        ]
    return [Config(128, 128, warps=8, stages=3), Config(64, 128, stages=4)]
