"""Sums that were computed in parts: added in a fixed order, so that results do not depend on which
part was done first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qcompiler.backends.triton.codes import cast
from qcompiler.backends.triton.operators import early


@triton.jit
def _add(parts, bias, y, size, rows, PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(PARTS):
        total += tl.load(parts + i * size + at, mask=at < size, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % rows, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y + at, cast(total, y.dtype.element_ty), mask=at < size)


def sum_parts(parts: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Σ parts (parts, tokens, rows) float32, plus the bias of each row."""
    count, tokens, rows = parts.shape
    y = parts.new_empty((tokens, rows), dtype=dtype)
    size = tokens * rows
    torch.library.wrap_triton(_add)[(triton.cdiv(size, 1024),)](
        parts, bias, y, size, rows, PARTS=count, BLOCK=1024, **early(parts)
    )
    return y
