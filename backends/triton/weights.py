"""Weights as kernels want them: packed, padded, with their scales and zero points beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompiler.backends.triton import layout
from qcompiler.formats import QTensor
from qcompiler.formats.grid import block_range

SHORT_LANES, LANES = 16, 32
"""Lanes of 4-bit words: for products of 16-bit numbers, and of int8."""


@dataclass(frozen=True)
class Weight:
    """A weight as a kernel wants it."""

    tensors: Mapping[str, Tensor]
    rows: int
    group: int = 0
    """Inputs with one scale."""
    fp4: bool = False


def group_of(q: QTensor) -> int | None:
    """Inputs that share a scale along a row; 0 for a whole row; None for blocks over rows."""
    block = q.format.block
    if block is None or block == (-1,):
        return 0
    return block[0] if len(block) == 1 else None


def words(q: QTensor, lanes: int) -> Weight:
    rows = int(q.data.shape[0])
    fp4 = not q.format.is_integer
    shift = 8 if q.format.signed and not fp4 else 0
    packed = layout.pack_words(q.data.int() + shift & 15, lanes)
    inner = packed.shape[0] * layout.PLANES * lanes
    group = group_of(q) or inner
    groups = -(-inner // group)
    scale = layout.pack_scales(_silenced(q), rows, groups)
    tensors = {"words": packed, "scale": scale}
    zero = q.zero if q.zero is not None or shift or fp4 else torch.zeros_like(q.scale)
    if zero is not None:
        moved = layout.pack_scales(_sides(zero.float() + shift, rows), rows, groups)
        whole = torch.equal(moved, moved.round()) and moved.min() >= 0 and moved.max() <= 255
        tensors["zero"] = moved.to(torch.uint8) if whole else moved
    return Weight(tensors, rows, group, fp4)


def _silenced(q: QTensor) -> Tensor:
    """Scales (rows, groups), 0 in groups of zeros: their sums cancel but for a last digit, which
    nobody must see."""
    fmt = q.format if q.format.block is not None else replace(q.format, block=(-1,))
    largest = block_range(q.dequantize().abs(), fmt)[1]
    return _sides(q.scale, len(q.data)).expand(largest.shape).where(largest != 0, 0.0)


def _sides(scale: Tensor, rows: int) -> Tensor:
    """Scales as (rows or 1, groups)."""
    return scale.reshape(1, 1) if scale.numel() == 1 else scale.reshape(rows, -1)


def _codes(q: QTensor) -> tuple[Tensor, int]:
    """8-bit codes in int8, or e4m3's bits in uint8, and what has been added to them."""
    if not q.format.is_integer:
        return (q.data.int() & 255).to(torch.uint8), 0
    shift = 0 if q.format.signed else -128
    return (q.data.int() + shift).to(torch.int8), shift


def octets(q: QTensor) -> Weight:
    rows = int(q.data.shape[0])
    codes, shift = _codes(q)
    weight = layout.pack_rows(codes)
    group = group_of(q) or 0
    groups = -(-weight.shape[1] // group) if group else 1
    tensors = {"weight": weight, "scale": layout.pack_scales(_sides(q.scale, rows), rows, groups)}
    zero = q.zero if q.zero is not None or not shift else torch.zeros_like(q.scale)
    if zero is not None:
        tensors["zero"] = layout.pack_scales(_sides(zero.float() + shift, rows), rows, groups)
    return Weight(tensors, rows, group)


def plain_octets(q: QTensor) -> Weight:
    rows = int(q.data.shape[0])
    scale = q.scale.reshape(-1).float().expand(rows).contiguous()
    return Weight({"weight": layout.pack_rows(_codes(q)[0]), "scale": scale}, rows)
