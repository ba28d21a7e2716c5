"""Attention as one operator; forms with a cache, a soft cap or a second output are spelled out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompiler.capture.onnx.call import Call
from qcompiler.capture.onnx.table import op


@op("Attention")
def attention(call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ · scale + mask) v on (batch, heads, length, size), or with the heads merged."""
    merged = q.ndim == 3
    if merged:
        heads, groups = call.int("q_num_heads"), call.int("kv_num_heads")
        q, k, v = (_heads(x, n) for x, n in ((q, heads), (k, groups), (v, groups)))
    scale = call.float("scale") if call.has("scale") else None
    causal = bool(call.int("is_causal", 0))
    if causal and mask is not None:
        mask, causal = _with_causal(q, k, mask), False
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return torch.flatten(y.permute(0, 2, 1, 3), 2) if merged else y


def _heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], count, -1).permute(0, 2, 1, 3)


def _with_causal(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """`mask` and nothing that lies ahead, counted from the first token of both."""
    rows, columns = torch.arange(q.shape[2]).unsqueeze(1), torch.arange(k.shape[2])
    seen = columns <= rows
    if mask.dtype == torch.bool:
        return mask & seen
    return torch.where(seen, mask, -torch.inf)
