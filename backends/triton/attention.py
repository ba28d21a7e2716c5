"""Attention of one new token over a quantized cache of keys and values (flash-decoding).

    y = softmax(q Rope(s_k k)ᵀ / √d) (s_v v)

k and v are int8 codes or the bits of e4m3, with scales per token or per channel. Keys may be kept
before their rotary embedding, where a channel is still one channel (KVQuant, Hooper et al. 2024,
section 3.1); they are turned as they are read. The tokens of a sequence are divided among programs,
each of which serves all queries of one key-value head (GQA) in one product; a second kernel adds
their sums, scaled to a common maximum, in a fixed order (Dao et al. 2023, flash-decoding).

    keys, values   (sequences, heads, capacity, d)
    scales         (sequences, heads, capacity, 1) per token, (… or 1, heads, 1, d) per channel
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.backends.triton.codes import cast, dot
from qcompiler.backends.triton.operators import operator
from qcompiler.backends.triton.runtime import processors
from qcompiler.backends.triton.w8a16 import number

TILE = 64
"""Tokens that one step reads."""
LEAST = 16
"""Sides of a product on the tensor cores are at least so long."""


@triton.jit
def _parts(
    q, keys, values, k_scale, v_scale, cos, sin, lengths, out, peak, mass,
    heads, capacity, part, norm, k_step, v_step,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    TILE: tl.constexpr, FP8: tl.constexpr, K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Tokens [part · program_id(1), …) of one key-value head."""
    pair, piece, pieces = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    sequence = pair // heads
    g, d = tl.arange(0, QUERIES), tl.arange(0, HALF)[None, :]
    there = (g < GROUP)[:, None] & (d < D // 2)
    row = q + (pair * GROUP + g).to(tl.int64)[:, None] * D + d
    q1 = tl.load(row, mask=there, other=0.0)
    q2 = tl.load(row + D // 2, mask=there, other=0.0)
    length = tl.load(lengths + sequence)
    top = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    y1 = tl.zeros((QUERIES, HALF), tl.float32)
    y2 = tl.zeros((QUERIES, HALF), tl.float32)
    for first in range(piece * part, tl.minimum((piece + 1) * part, length), TILE):
        t = first + tl.arange(0, TILE)
        seen = (t < length)[:, None] & (d < D // 2)
        at = (pair.to(tl.int64) * capacity + t)[:, None] * D + d
        k1 = number(tl.load(keys + at, mask=seen, other=0), FP8)
        k2 = number(tl.load(keys + at + D // 2, mask=seen, other=0), FP8)
        if not K_TOKEN:
            side = k_scale + pair % k_step * D + d
            k1 *= tl.load(side, mask=d < D // 2, other=0.0)
            k2 *= tl.load(side + D // 2, mask=d < D // 2, other=0.0)
        if cos is not None:
            angle = t[:, None] * D + d
            c1, s1 = (
                tl.load(cos + angle, mask=seen, other=0.0),
                tl.load(sin + angle, mask=seen, other=0.0),
            )
            angle += D // 2
            c2, s2 = (
                tl.load(cos + angle, mask=seen, other=0.0),
                tl.load(sin + angle, mask=seen, other=0.0),
            )
            turned = k1 * c1 - k2 * s1
            k2 = k2 * c2 + k1 * s2
            k1 = turned
        scores = tl.zeros((QUERIES, TILE), tl.float32)
        scores = dot(cast(q1, DTYPE), tl.trans(cast(k1, DTYPE)), scores)
        scores = dot(cast(q2, DTYPE), tl.trans(cast(k2, DTYPE)), scores) * norm
        inside = t < length
        if K_TOKEN:
            scores *= tl.load(k_scale + pair * capacity + t, mask=inside, other=0.0)[None, :]
        scores = tl.where(inside[None, :], scores, -1e30)
        new = tl.maximum(top, tl.max(scores, 1))
        p, keep = tl.exp(scores - new[:, None]), tl.exp(top - new)
        total = total * keep + tl.sum(p, 1)
        top = new
        if V_TOKEN:
            p *= tl.load(v_scale + pair * capacity + t, mask=inside, other=0.0)[None, :]
        v1 = number(tl.load(values + at, mask=seen, other=0), FP8)
        v2 = number(tl.load(values + at + D // 2, mask=seen, other=0), FP8)
        y1 = dot(cast(p, DTYPE), cast(v1, DTYPE), y1 * keep[:, None])
        y2 = dot(cast(p, DTYPE), cast(v2, DTYPE), y2 * keep[:, None])
    if not V_TOKEN:
        side = v_scale + pair % v_step * D + d
        y1 *= tl.load(side, mask=d < D // 2, other=0.0)
        y2 *= tl.load(side + D // 2, mask=d < D // 2, other=0.0)
    place = (pair * GROUP + g) * pieces + piece
    tl.store(peak + place, top, mask=g < GROUP)
    tl.store(mass + place, total, mask=g < GROUP)
    tl.store(out + place[:, None] * D + d, y1, mask=there)
    tl.store(out + place[:, None] * D + D // 2 + d, y2, mask=there)


@triton.jit
def _merge(
    out, peak, mass, y, pieces, D: tl.constexpr, PIECES: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """One query head."""
    head, i, d = tl.program_id(0), tl.arange(0, PIECES), tl.arange(0, WIDE)
    top = tl.load(peak + head * pieces + i, mask=i < pieces, other=-1e30)
    weight = tl.exp(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(mass + head * pieces + i, mask=i < pieces, other=0.0), 0)
    at = (head * pieces + i)[:, None] * D + d[None, :]
    part = tl.load(out + at, mask=(i < pieces)[:, None] & (d < D)[None, :], other=0.0)
    sums = tl.sum(part * weight[:, None], 0)
    # A sequence without a token in its cache gets zero, as a query that sees no key does.
    sums = tl.where(total > 0, sums / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(y + head * D + d, cast(sums, y.dtype.element_ty), mask=d < D)


def _shape(
    q: Tensor, keys: Tensor, values: Tensor, k_scale: Tensor, v_scale: Tensor, lengths: Tensor,
    cos: Tensor | None, sin: Tensor | None,
) -> Tensor:  # fmt: skip
    return torch.empty_like(q)


@operator(_shape)
def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, k_scale: Tensor, v_scale: Tensor, lengths: Tensor,
    cos: Tensor | None, sin: Tensor | None,
) -> Tensor:  # fmt: skip
    """q (sequences, query heads, d) → the same shape; `lengths` (sequences,) int32: tokens in the
    cache; cos and sin (capacity, d) turn keys that are kept before their rotary embedding."""
    (sequences, heads, capacity, d), queries = keys.shape, q.shape[1]
    group = queries // heads
    y = torch.empty_like(q)
    if q.numel() == 0:
        return y
    wanted = max(1, 2 * processors(q.device) // (sequences * heads))
    part = triton.cdiv(triton.cdiv(max(capacity, 1), wanted), TILE) * TILE
    pieces = triton.cdiv(max(capacity, 1), part)
    sums = q.new_empty((sequences * queries, pieces, d), dtype=torch.float32)
    peak, mass = (q.new_empty(sums.shape[:2], dtype=torch.float32) for _ in range(2))
    wrap = torch.library.wrap_triton
    wrap(_parts)[(sequences * heads, pieces)](
        q.contiguous(), keys.contiguous(), values.contiguous(),
        k_scale.float().contiguous(), v_scale.float().contiguous(), cos, sin, lengths,
        sums, peak, mass, heads, capacity, part, d**-0.5,
        k_scale.shape[0] * k_scale.shape[1], v_scale.shape[0] * v_scale.shape[1],
        GROUP=group, QUERIES=max(triton.next_power_of_2(group), LEAST), D=d,
        HALF=max(triton.next_power_of_2(d // 2), LEAST), TILE=TILE,
        FP8=keys.dtype == torch.uint8,
        K_TOKEN=k_scale.shape[-1] == 1, V_TOKEN=v_scale.shape[-1] == 1,
        DTYPE=tl.float16 if q.dtype == torch.float16 else tl.bfloat16, num_warps=4,
    )  # fmt: skip
    wrap(_merge)[(sequences * queries,)](
        sums, peak, mass, y, pieces, D=d, PIECES=triton.next_power_of_2(pieces),
        WIDE=triton.next_power_of_2(d),
    )  # fmt: skip
    return y
