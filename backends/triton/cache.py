"""A cache of keys and values whose rows are rounded to 8 bits, and attention that reads its codes.

    append_rows(past, new, axis, fp8)               cat([past, fakequant(new)], axis)
    attend(q, k, v, mask, scale, causal)            scaled_dot_product_attention(q, k, v, mask)

As operators they are what the right side says, on numbers. When an artifact runs, its cache is
`Coded`: the functions here append codes in place, and one query reads them as they lie in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qcompiler.append import append
from qcompiler.coded import Coded, numbers
from qcompiler.ops import fake_quantize

FORMATS = {"int8:token:dynamic": False, "fp8_e4m3:token:dynamic": True}
"""What rows may be rounded to, and whether that is e4m3."""
OPS = torch.ops.qc_triton


def append_rows(past: Tensor, new: Tensor, axis: int, fp8: bool) -> Tensor:
    """cat([past, round(new)], axis), new (…, n) rounded by rows; `axis` is not the last.

    Coded if `past` is, or is empty; numbers that were handed in stay what they are.
    """
    kind = torch.uint8 if fp8 else torch.int8
    if isinstance(past, Coded) and past.codes.dtype != kind:
        past = numbers(past)  # of another artifact, rounded otherwise
    if not isinstance(past, Coded):
        if past.shape[axis]:
            return append(past, fake_quantize(new, _format(fp8)), axis)
        codes = past.new_empty(past.shape, dtype=kind)
        past = Coded(codes, past.new_empty(past.shape[:-1], dtype=torch.float32), past.dtype)
    codes, scales = OPS.round_rows(new, None, fp8)  # padded behind the row
    codes = append(past.codes, codes[..., : new.shape[-1]], axis)
    return Coded(codes, append(past.scales, scales.squeeze(-1), axis), past.dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """Attention of q (batch, heads, tokens, d) over k and v (batch, groups of heads, keys, d)."""
    batch, heads, tokens, _ = q.shape
    kinds = {t.codes.dtype if isinstance(t, Coded) else None for t in (k, v)}
    alike = len(kinds) == 1 and None not in kinds and heads % k.shape[1] == 0
    if tokens == 1 and not causal and alike:
        seen = None if mask is None else mask.expand(batch, heads, 1, k.shape[2]).squeeze(2)
        assert isinstance(k, Coded) and isinstance(v, Coded)
        sides = (t.scales.unsqueeze(-1) for t in (k, v))
        given = (q.squeeze(2), k.codes, v.codes, *sides, None, None, None, seen, scale)
        found: Tensor = OPS.decode_attention(*given)
        return found.unsqueeze(2)
    return _attend(q, numbers(k), numbers(v), mask, scale, causal)


def _format(fp8: bool) -> str:
    return next(name for name, is_fp8 in FORMATS.items() if is_fp8 == fp8)


def _append_rows(past: Tensor, new: Tensor, axis: int, fp8: bool) -> Tensor:
    return torch.cat([past, torch.ops.qc.fake_quantize(new, _format(fp8))], axis)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    grouped = q.shape[1] > k.shape[1]
    return scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


_library = torch.library.Library("qc_triton", "FRAGMENT")
_library.define("append_rows(Tensor past, Tensor new, int axis, bool fp8) -> Tensor")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal) -> Tensor"
)
_library.impl("append_rows", _append_rows, "CompositeExplicitAutograd")
_library.impl("attend", _attend, "CompositeExplicitAutograd")
APPEND_ROWS, ATTEND = OPS.append_rows.default, OPS.attend.default
CARRIED = {APPEND_ROWS: append_rows, ATTEND: attend}
"""What runs in the place of an operator that meets codes."""
