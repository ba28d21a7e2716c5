"""Attention of many queries, as of a prompt: keys that no query of a block may see are left out.

A causal mask hides half of the keys, a window most; torch multiplies by all of them. What is hidden
has the weight 0, so that leaving it out changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BLOCK = 256
"""Queries that are computed together."""


def attend_many(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """torch's attention of q (batch, heads, tokens, d) over k and v (batch, groups, keys, d)."""
    grouped = q.shape[1] > k.shape[1]
    tokens = q.shape[2]
    whole = mask is not None and mask.shape[-2:] == (tokens, k.shape[2])
    fits = whole and mask is not None and mask.dtype == torch.bool and not causal
    if mask is None or not fits or tokens < 2 * BLOCK:
        return scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    y = torch.empty(q.shape[0], tokens, q.shape[1], v.shape[-1], dtype=q.dtype).transpose(1, 2)
    for start, first, last in _seen(mask):
        rows, keys = slice(start, start + BLOCK), slice(first, last)
        y[:, :, rows] = scaled_dot_product_attention(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], mask[..., rows, keys], scale=scale,
            enable_gqa=grouped,
        )  # fmt: skip
    return y


def _seen(mask: Tensor) -> list[tuple[int, int, int]]:
    """(its first query, the first key that any of its queries sees, one behind the last) of each
    block. A block that sees nothing has one key, which is hidden."""
    for axis in range(mask.ndim - 2):  # what is only repeated is looked at once
        if mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    whole = mask.reshape(-1, *mask.shape[-2:]).any(0)
    found = []
    for start in range(0, len(whole), BLOCK):
        keys = whole[start : start + BLOCK].any(0).nonzero()
        first, last = (int(keys[0]), int(keys[-1]) + 1) if len(keys) else (0, 1)
        found.append((start, first, last))
    return found
