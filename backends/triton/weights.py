"""Weights as kernels want them: packed, padded, with their scales and zero points beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompiler.backends.triton import layout
from qcompiler.formats import QTensor
from qcompiler.formats.grid import block_range

LANES = (64, 32, 16)
"""Inputs that one product sums over, and that share a scale: as many of them as a group allows."""
BITS = {"int4": 4, "fp4": 4, "int8": 8, "e4m3": 8}


@dataclass(frozen=True)
class Weight:
    """A weight as a kernel wants it."""

    tensors: Mapping[str, Tensor]
    rows: int
    group: int = 0
    """Inputs with one scale."""
    kind: str = ""
    """What its units hold, as `codes.py` names it."""


def group_of(q: QTensor) -> int | None:
    """Inputs that share a scale along a row; 0 for a whole row; None for blocks over rows."""
    block = q.format.block
    if block is None or block == (-1,):
        return 0
    return block[0] if len(block) == 1 else None


def units(q: QTensor, unit: int) -> Weight:
    """4- and 8-bit codes in units of 8 or 16 bits."""
    rows, kind = int(q.data.shape[0]), kind_of(q)
    group = group_of(q) or 0
    lanes = next(n for n in LANES if group % n == 0)
    codes, shift = _codes(q, kind)
    packed = layout.pack_units(codes, lanes, BITS[kind], unit)
    inner = packed.shape[0] * lanes * unit // BITS[kind]
    group = group or inner
    groups = -(-inner // group)
    tensors = {"units": packed, "scale": layout.pack_scales(_silenced(q), rows, groups)}
    # Codes of int4 stand for numbers from -8 on, so that these need no zero point.
    if q.zero is not None or shift != (8 if kind == "int4" else 0):
        zero = torch.zeros_like(q.scale) if q.zero is None else q.zero.float().expand_as(q.scale)
        moved = layout.pack_scales(_sides(zero + shift, rows), rows, groups)
        whole = torch.equal(moved, moved.round()) and moved.min() >= 0 and moved.max() <= 127
        tensors["zero"] = moved.to(torch.uint8) if whole else moved
    return Weight(tensors, rows, group, kind)


def kind_of(q: QTensor) -> str:
    """What its codes stand for, as `codes.py` names it."""
    if q.format.is_integer:
        return "int4" if q.format.bits <= 4 else "int8"
    return "fp4" if q.format.bits <= 4 else "e4m3"


def _codes(q: QTensor, kind: str) -> tuple[Tensor, int]:
    """Codes as bits, not negative, and what has been added to the numbers that they stand for."""
    data = q.data.int()
    if kind == "int4":
        shift = 8 if q.format.signed else 0
        return data + shift & 15, shift
    shift = -128 if kind == "int8" and not q.format.signed else 0
    return data + shift & 255, shift


def _silenced(q: QTensor) -> Tensor:
    """Scales (rows, groups), 0 in groups of zeros: their sums cancel but for a last digit, which
    nobody must see."""
    fmt = q.format if q.format.block is not None else replace(q.format, block=(-1,))
    largest = block_range(q.dequantize().abs(), fmt)[1]
    return _sides(q.scale, len(q.data)).expand(largest.shape).where(largest != 0, 0.0)


def _sides(scale: Tensor, rows: int) -> Tensor:
    """Scales as (rows or 1, groups)."""
    return scale.reshape(1, 1) if scale.numel() == 1 else scale.reshape(rows, -1)


def plain_octets(q: QTensor) -> Weight:
    rows = int(q.data.shape[0])
    pad = layout.padded(rows, layout.ROWS) - rows
    scale = torch.nn.functional.pad(q.scale.reshape(-1).float().expand(rows), (0, pad))
    codes = q.data.to(torch.int8) if q.format.is_integer else (q.data.int() & 255).to(torch.uint8)
    return Weight({"weight": layout.pack_rows(codes), "scale": scale}, rows)
