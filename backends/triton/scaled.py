"""y = (q_x q_wᵀ) s_x s_w + b: products of 8-bit codes with scales per token and per row.

int8 is summed in int32, exactly; e4m3 in float32 (on Hopper its tensor cores keep some 14 bits of
a sum in flight). Two forms of the same loop: pointers, and, from Hopper on, descriptors with which
the tensor memory accelerator fetches tiles, in as many programs as there are multiprocessors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qcompiler.backends.triton.codes import PLAIN, cast
from qcompiler.backends.triton.few import few, few_options, may_be_whole
from qcompiler.backends.triton.operators import early, operator, rows_of
from qcompiler.backends.triton.runtime import capability, processors
from qcompiler.backends.triton.tune import Config, best, bucket

FEW_LANES = 128
"""Inputs that one product of `few` sums over."""
BAND = 8
"""Tiles of tokens that are computed one after another, so that weights are in cache."""


@triton.jit
def _place(tile, tokens, rows, TOKENS: tl.constexpr, ROWS: tl.constexpr, BAND: tl.constexpr):
    """First token and row of a tile."""
    down, across = tl.cdiv(tokens, TOKENS), tl.cdiv(rows, ROWS)
    band = tile // (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    inside = tile % (BAND * across)
    return (band * BAND + inside % height) * TOKENS, inside // height * ROWS


@triton.jit
def _finish(
    acc, x_scale, scale, bias, y, m0, n0, tokens, rows, TOKENS: tl.constexpr, ROWS: tl.constexpr
):
    """Scales, bias and the store of a tile."""
    m, n = m0 + tl.arange(0, TOKENS), n0 + tl.arange(0, ROWS)
    s = tl.load(x_scale + m, mask=m < tokens, other=0.0)
    out = acc.to(tl.float32) * s[:, None] * tl.load(scale + n, mask=n < rows, other=0.0)[None, :]
    if bias is not None:
        out += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    at = y + m.to(tl.int64)[:, None] * rows + n[None, :]
    tl.store(at, cast(out, y.dtype.element_ty), mask=(m < tokens)[:, None] & (n < rows)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _pointers(
    x, x_scale, weight, scale, bias, y, tokens, width, rows,
    SUM: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
    BAND: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    m0, n0 = _place(tl.program_id(0), tokens, rows, TOKENS, ROWS, BAND)
    m = tl.minimum(m0 + tl.arange(0, TOKENS), tokens - 1).to(tl.int64)
    n = (n0 + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.arange(0, INNER)
    left = x + m[:, None] * width + k[None, :]
    right = weight + n[None, :] * width + k[:, None]
    acc = tl.zeros((TOKENS, ROWS), SUM)
    for _ in range(0, width, INNER):
        acc = tl.dot(tl.load(left), tl.load(right), acc, out_dtype=SUM)
        left += INNER
        right += INNER
    _finish(acc, x_scale, scale, bias, y, m0, n0, tokens, rows, TOKENS, ROWS)


@triton.jit(do_not_specialize=["tokens"])
def _descriptors(
    x, x_scale, weight, scale, bias, y, tokens, width, rows, padded,
    SUM: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
    BAND: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, TOKENS) * tl.cdiv(rows, ROWS)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    # Descriptors are written to memory, which the kernel in front may still use: behind the wait.
    left = tl.make_tensor_descriptor(x, [tokens, width], [width, 1], [TOKENS, INNER])
    right = tl.make_tensor_descriptor(weight, [padded, width], [width, 1], [ROWS, INNER])
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m0, n0 = _place(tile, tokens, rows, TOKENS, ROWS, BAND)
        acc = tl.zeros((TOKENS, ROWS), SUM)
        for k in range(0, width, INNER):
            acc = tl.dot(left.load([m0, k]), right.load([n0, k]).T, acc, out_dtype=SUM)
        _finish(acc, x_scale, scale, bias, y, m0, n0, tokens, rows, TOKENS, ROWS)


def _shape(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
    rows: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], rows), dtype=dtype)


@operator(_shape)
def linear_scaled(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
    rows: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Codes x (…, padded inputs) with scales (…, 1) as `round_rows` makes them, codes weight
    (padded rows, padded inputs), both int8 or e4m3 bits in uint8, scale (padded rows,) float32 →
    (…, rows) of `dtype`."""
    flat = rows_of(x)
    if flat.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], rows), dtype=dtype)
    if x.dtype == torch.uint8:
        flat, weight = flat.view(torch.float8_e4m3fn), weight.view(torch.float8_e4m3fn)
    given = (flat, x_scale, scale, bias, rows, dtype)
    key = f"scaled {bucket(flat.shape[0])} {tuple(weight.shape)} {flat.dtype} {dtype}"
    config = best(key, (weight,), candidates(flat, weight), lambda c, w: launch(c, w, *given))
    return launch(config, weight, *given).reshape(*x.shape[:-1], rows)


def launch(
    config: Config, weight: Tensor, x: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None,
    rows: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    tokens, width = x.shape
    y = x.new_empty((tokens, rows), dtype=dtype)
    tiles = triton.cdiv(tokens, config.tokens) * triton.cdiv(rows, config.rows)
    options = {
        "SUM": tl.int32 if x.dtype == torch.int8 else tl.float32,
        "TOKENS": config.tokens, "ROWS": config.rows, "INNER": config.inner, "BAND": BAND,
        "num_warps": config.warps, "num_stages": config.stages, **early(weight),
    }  # fmt: skip
    wrap = torch.library.wrap_triton
    if config.apart:
        blocks = width // FEW_LANES
        part = triton.cdiv(blocks, config.warps) * config.warps
        wrap(few)[(triton.cdiv(rows, config.rows), triton.cdiv(tokens, config.tokens), 1)](
            x, x_scale, weight, scale, None, bias, y,
            tokens, width, rows, 0, FEW_LANES, width, blocks, part,
            SPAN=1, SHARED=1, PLANES=1, LANES=FEW_LANES, KIND=PLAIN.value, ZERO=0, ONE=True,
            EVEN=blocks == part, DTYPE=tl.int8, ROWS=config.rows, TOKENS=config.tokens,
            **few_options(config, tokens, part, weight), **early(weight),
        )  # fmt: skip
    elif config.descriptors:
        triton.set_allocator(
            lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=x.device)
        )
        wrap(_descriptors)[(min(tiles, processors(x.device)),)](
            x, x_scale, weight, scale, bias, y, tokens, width, rows, weight.shape[0], **options
        )
    else:
        wrap(_pointers)[(tiles,)](
            x, x_scale, weight, scale, bias, y, tokens, width, rows, **options
        )
    return y


def candidates(x: Tensor, weight: Tensor) -> list[Config]:
    """The first fits every GPU; those with descriptors are for Hopper and later ones."""
    tokens = x.shape[0]
    if tokens <= 16:
        # They read activations from the cache of a multiprocessor, which more tokens leave, and
        # count in 32 bits what comes before a row.
        fits = tokens <= 8 and x.dtype == torch.int8 and weight.numel() < 2**31
        return [
            Config(64, 16, 128, stages=4),
            Config(32, 16, 128, warps=2, stages=5),
            *(_few(weight.shape[1] // FEW_LANES) if fits else ()),
        ]
    if tokens <= 64:
        return [Config(64, 64, 128, stages=4), Config(128, 64, 128, stages=4)]
    plain = [Config(128, 128, 128, warps=8, stages=3), Config(256, 128, 64, warps=8, stages=4)]
    plain.append(Config(128, 128, 128, warps=4, stages=3))
    if capability(x.device)[0] < 9:
        return plain
    return [
        *plain,
        Config(256, 128, 128, warps=8, stages=3, descriptors=True),
        Config(256, 128, 128, warps=8, stages=4, descriptors=True),
        Config(128, 256, 128, warps=8, stages=4, descriptors=True),
    ]


def _few(blocks: int) -> list[Config]:
    """Tiles of `few` for rows of so many blocks."""
    tiles = [(16, 4, 1, 0), (16, 8, 1, 96), (16, 4, 2, 128), (16, 8, 2, 128), (32, 8, 1, 128)]
    made = [
        Config(rows, 8, FEW_LANES, warps=warps, stages=ahead, apart=True, registers=registers)
        for rows, warps, ahead, registers in tiles
    ]
    return made + [
        Config(rows, 8, FEW_LANES, warps=warps, stages=1, apart=True, whole=True, registers=128)
        for rows, warps in ((16, 8), (32, 8))
        if may_be_whole(rows, warps, blocks)
    ]
