"""Attention of one new token over a quantized cache of keys and values (flash-decoding).

    y = softmax(q Rope(s_k k)ᵀ / √d) (s_v v)

k and v are int8 codes or the bits of e4m3, with scales per token or per channel. Keys may be kept
before their rotary embedding, where a channel is still one channel (KVQuant, Hooper et al. 2024,
section 3.1); they are turned as they are read. The tokens of a sequence are divided among programs,
each of which serves all queries of one key-value head (GQA) in one product; a second kernel adds
their sums, scaled to a common maximum, in a fixed order (Dao et al. 2023, flash-decoding).

int8 keys go into the product as they lie in memory: a query, times the scales of channels, becomes
two of int8, 256 high + low, right to 16 bits. Scores are computed with tokens in rows, where few
queries cost little; values are the right side of the second product.

    keys, values   (sequences, heads, capacity, d), with room behind each head's if they grow
    scales         (sequences, heads, capacity, 1) per token, (… or 1, heads, 1, d) per channel
    mask           (sequences, query heads, capacity), of any strides
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.backends.triton.codes import E4M3, INT8, cast, dot, number
from qcompiler.backends.triton.operators import operator
from qcompiler.backends.triton.rows import ROUND
from qcompiler.backends.triton.runtime import processors
from qcompiler.backends.triton.tune import Config, best, bucket
from qcompiler.backends.triton.widen import floats

LEAST = 16
"""Sides of a product on the tensor cores are at least so long."""
LOG2_E = tl.constexpr(1.4426950408889634)
LEAST_SCORE = tl.constexpr(-1e29)
"""What masks of numbers add at least, and less this at most: float32's ends would overflow."""


@triton.jit
def _tile(codes, t, d, D: tl.constexpr):
    """Codes of the tokens t."""
    at = codes + t[:, None] * D + d[None, :]
    if d.shape[0] == D:
        return tl.load(at)
    else:
        return tl.load(at, mask=(d < D)[None, :], other=0)


@triton.jit
def _turned(codes, k_side, cos, sin, t, d, FP8: tl.constexpr, D: tl.constexpr):
    """Keys behind their rotary embedding: s k cos + (-(s k)₂, (s k)₁) sin, in float32."""
    KIND: tl.constexpr = E4M3 if FP8 else INT8
    other = (d + D // 2) % D
    k = number(_tile(codes, t, d, D).to(tl.int32), KIND)
    k2 = number(_tile(codes, t, other, D).to(tl.int32), KIND)
    if k_side is not None:
        k *= tl.load(k_side + d, mask=d < D, other=0.0)[None, :]
        k2 *= tl.load(k_side + other, mask=d < D, other=0.0)[None, :]
    k2 *= tl.where(d < D // 2, -1.0, 1.0)[None, :]
    return k * _tile(cos, t, d, D) + k2 * _tile(sin, t, d, D)


@triton.jit
def _halves(q):
    """q (d, queries) as unit (256 high + low): two of int8, and a unit for each query."""
    unit = tl.maximum(tl.max(tl.abs(q), 0), 1e-30) / 32512.0
    n = (q / unit[None, :] + ROUND) - ROUND
    high = tl.floor(n / 256.0 + 0.5)
    return high.to(tl.int8), (n - 256.0 * high).to(tl.int8), unit


@triton.jit(do_not_specialize=("capacity", "k_scale_row", "v_scale_row", "mask_sequence"))
def _parts(
    q, keys, values, k_scale, v_scale, cos, sin, lengths, mask, out, peak, mass,
    heads, capacity, norm, k_row, v_row, k_scale_row, v_scale_row, k_step, v_step,
    mask_sequence, mask_head, mask_token,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr, FP8: tl.constexpr, K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """One piece, program_id(1), of the tokens of one key-value head. Rows are the steps from one
    head to the next."""
    pair, piece, pieces = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    WHOLE: tl.constexpr = cos is None and not FP8
    g, d = tl.arange(0, QUERIES), tl.arange(0, WIDE)
    row = (pair * GROUP + g).to(tl.int64)
    there = (d < D)[:, None] & (g < GROUP)[None, :]
    query = tl.load(q + row[None, :] * D + d[:, None], mask=there, other=0.0).to(tl.float32)
    k_side = None if K_TOKEN else k_scale + pair % k_step * k_scale_row
    if not K_TOKEN and cos is None:
        query *= tl.load(k_side + d, mask=d < D, other=0.0)[:, None]
    if WHOLE:
        high, low, unit = _halves(query)
        unit *= norm
    else:
        query = cast(query, DTYPE)
    length = capacity
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + pair // heads), capacity)
    part = tl.cdiv(tl.cdiv(length, pieces), TILE) * TILE
    keys += pair.to(tl.int64) * k_row
    values += pair.to(tl.int64) * v_row
    if mask is not None:
        mask += (pair // heads).to(tl.int64) * mask_sequence
        mask += ((pair % heads * GROUP + g) * mask_head)[None, :]
    top = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((TILE, QUERIES), tl.float32)
    y = tl.zeros((QUERIES, WIDE), tl.float32)
    for first in range(piece * part, tl.minimum((piece + 1) * part, length), TILE):
        inside = first + tl.arange(0, TILE) < length
        t = tl.minimum(first + tl.arange(0, TILE), length - 1)
        if WHOLE:
            k = _tile(keys, t, d, D)
            sums = dot(k, high, tl.zeros((TILE, QUERIES), tl.int32)) * 256
            scores = dot(k, low, sums).to(tl.float32) * unit[None, :]
        else:
            if cos is None:
                k = floats(_tile(keys, t, d, D), FP8, DTYPE)
            else:
                k = cast(_turned(keys, k_side, cos, sin, t, d, FP8, D), DTYPE)
            scores = dot(k, query, tl.zeros((TILE, QUERIES), tl.float32)) * norm
        if K_TOKEN:
            scores *= tl.load(k_scale + pair.to(tl.int64) * k_scale_row + t)[:, None]
        seen = inside[:, None]
        if mask is not None:
            seen &= (g < GROUP)[None, :]
            given = tl.load(mask + t[:, None] * mask_token, mask=seen, other=0)
            if mask.dtype.element_ty == tl.uint8:
                seen &= given != 0
            else:
                given = given.to(tl.float32)
                seen &= given > -float("inf")
                scores += tl.clamp(given, LEAST_SCORE, -LEAST_SCORE) * LOG2_E
        scores = tl.where(seen, scores, -1e30)
        new = tl.maximum(top, tl.max(scores, 0))
        p, keep = tl.exp2(scores - new[None, :]), tl.exp2(top - new)
        if mask is not None:  # where nothing is seen, all is as large as the largest
            p = tl.where(seen, p, 0.0)
        total = total * keep[None, :] + p
        top = new
        if V_TOKEN:
            p *= tl.load(v_scale + pair.to(tl.int64) * v_scale_row + t)[:, None]
        v = floats(_tile(values, t, d, D), FP8, DTYPE)
        y = dot(tl.trans(cast(p, DTYPE)), v, y * keep[:, None])
    if not V_TOKEN:
        y *= tl.load(v_scale + pair % v_step * v_scale_row + d, mask=d < D, other=0.0)[None, :]
    place = row * pieces + piece
    tl.store(peak + place, top, mask=g < GROUP)
    tl.store(mass + place, tl.sum(total, 0), mask=g < GROUP)
    tl.store(out + place[:, None] * D + d[None, :], y, mask=tl.trans(there))


@triton.jit
def _merge(
    out, peak, mass, y, pieces, D: tl.constexpr, PIECES: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """One query head."""
    head, i, d = tl.program_id(0), tl.arange(0, PIECES), tl.arange(0, WIDE)
    top = tl.load(peak + head * pieces + i, mask=i < pieces, other=-1e30)
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(mass + head * pieces + i, mask=i < pieces, other=0.0), 0)
    at = (head * pieces + i)[:, None] * D + d[None, :]
    part = tl.load(out + at, mask=(i < pieces)[:, None] & (d < D)[None, :], other=0.0)
    sums = tl.sum(part * weight[:, None], 0)
    # A sequence without a token in its cache, and a query that sees no key, get zero.
    sums = tl.where(total > 0, sums / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(y + head * D + d, cast(sums, y.dtype.element_ty), mask=d < D)


def _shape(
    q: Tensor, keys: Tensor, values: Tensor, k_scale: Tensor, v_scale: Tensor,
    lengths: Tensor | None, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


@operator(_shape)
def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, k_scale: Tensor, v_scale: Tensor,
    lengths: Tensor | None, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """q (sequences, query heads, d) → the same shape; `lengths` (sequences,) int32: tokens in the
    cache, all without it; cos and sin (capacity, d) turn keys that are kept before their rotary
    embedding; `mask` (sequences, query heads, capacity): bool, True for what is seen, or numbers to
    add; `scale` of the scores, 1 / √d without it."""
    if q.numel() == 0 or keys.numel() == 0:
        return q.new_zeros(q.shape)
    q, keys, values = q.contiguous(), rows_apart(keys), rows_apart(values)
    lengths, cos, sin = (None if t is None else t.contiguous() for t in (lengths, cos, sin))
    k_scale, v_scale = (rows_apart(t.float()) for t in (k_scale, v_scale))
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    by = (k_scale.shape[-1] == 1, v_scale.shape[-1] == 1)
    kind = (q.dtype, keys.dtype, *by, cos is None, None if mask is None else mask.dtype)
    *most, capacity, d = keys.shape  # which grows by a token in each step
    key = " ".join(map(str, ("attention", q.shape[1], *most, bucket(capacity), d, *kind)))

    def full(config: Config, k: Tensor, v: Tensor) -> None:
        # No result to compare: behind the last token a cache holds anything.
        launch(config, q, k, v, k_scale, v_scale, None, cos, sin, mask, scale)

    config = best(key, (keys, values), candidates(keys), full)
    return launch(config, q, keys, values, k_scale, v_scale, lengths, cos, sin, mask, scale)


def rows_apart(x: Tensor) -> Tensor:
    """x (sequences, heads, n, d), each head in one run of memory, at equal distances."""
    sequence, head, *inner = x.stride()
    even = x.shape[0] == 1 or sequence == x.shape[1] * head
    whole = even and inner == [x.shape[3], 1]
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def launch(
    config: Config, q: Tensor, keys: Tensor, values: Tensor, k_scale: Tensor, v_scale: Tensor,
    lengths: Tensor | None, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """`split` pieces, read in steps of `tokens`."""
    (sequences, heads, capacity, d), queries = keys.shape, q.shape[1]
    group, pieces = queries // heads, config.split
    y = torch.empty_like(q)
    sums = q.new_empty((sequences * queries, pieces, d), dtype=torch.float32)
    peak, mass = (q.new_empty(sums.shape[:2], dtype=torch.float32) for _ in range(2))
    wrap = torch.library.wrap_triton
    wrap(_parts)[(sequences * heads, pieces)](
        q, keys, values, k_scale, v_scale, cos, sin, lengths, mask, sums, peak, mass,
        heads, capacity, LOG2_E.value * (d**-0.5 if scale is None else scale),
        *(t.stride(1) for t in (keys, values, k_scale, v_scale)),
        k_scale.shape[0] * k_scale.shape[1], v_scale.shape[0] * v_scale.shape[1],
        *((0, 0, 0) if mask is None else mask.stride()),
        GROUP=group, QUERIES=max(triton.next_power_of_2(group), LEAST), D=d,
        WIDE=max(triton.next_power_of_2(d), 2 * LEAST), TILE=config.tokens,
        FP8=keys.dtype == torch.uint8,
        K_TOKEN=k_scale.shape[-1] == 1, V_TOKEN=v_scale.shape[-1] == 1,
        DTYPE=tl.float16 if q.dtype == torch.float16 else tl.bfloat16,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    wrap(_merge)[(sequences * queries,)](
        sums, peak, mass, y, pieces, D=d, PIECES=triton.next_power_of_2(pieces),
        WIDE=triton.next_power_of_2(d),
    )  # fmt: skip
    return y


def candidates(keys: Tensor) -> list[Config]:
    """Steps, warps, stages, and in how many pieces some programs run on each processor at once."""
    sequences, heads, capacity, _ = keys.shape
    made = []
    for tokens, warps, stages, programs in (
        (32, 1, 1, 8),  # fits every GPU
        (64, 2, 3, 4),
        (64, 1, 3, 4),
        (32, 1, 2, 8),
        (64, 4, 2, 4),
    ):
        pieces = programs * processors(keys.device) // (sequences * heads)
        pieces = max(1, min(pieces, triton.cdiv(bucket(capacity), tokens)))
        made.append(Config(LEAST, tokens, split=pieces, warps=warps, stages=stages))
    return made
