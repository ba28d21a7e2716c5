"""Weights in the layout of `MatMulNBits`. Tensors in, tensors out; no graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.export.weights import Weight, container, group_of, pack_fields, unsigned
from qcompiler.formats import QFormat

BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes of `MatMulNBits`."""


def block_of(fmt: QFormat, width: int, activation: QFormat | None = None) -> int | None:
    """Block size with which `MatMulNBits` can express the format's groups; None if it cannot.

    With an `activation`, which the kernel rounds by itself, it is that of its groups.
    """
    group, bits = group_of(fmt, width), container(fmt.bits)
    if activation is not None:
        block = activation.block[-1] if activation.block else 0
        return block if block in BLOCKS and (group % block == 0 or group == width) else None
    if group < width:
        return next((b for b in BLOCKS if group % b == 0), None)
    # One scale for a row may be repeated: the least memory, data padded to blocks and scales.
    return min(BLOCKS, key=lambda b: -(-width // b) * (b * bits // 8 + 4))


@dataclass(frozen=True)
class Plane:
    """One weight of `MatMulNBits`."""

    data: Tensor
    """uint8 (N, blocks, block·bits/8)."""
    scale: Tensor
    """float32 (N, blocks)."""
    zero: Tensor | None
    """uint8 (N, ceil(blocks·bits/8)); None is the middle of the range."""


def planes(weight: Weight, block: int, integers: bool = False) -> list[Plane]:
    """The weight for `MatMulNBits`: one plane, or two of 4 bits for an 8 bit one.

    q - z = 16 (q_high - z_high) + (q_low - z_low). The kernel for 8 bits has float arithmetic only
    as a copy of the weight in float at each run, which makes one token ten times slower; in
    `integers` it is as good as the others.
    """
    fields, zero = unsigned(weight)
    bits = container(weight.format.bits)
    rows, width = fields.shape
    blocks = -(-width // block)
    fields = torch.nn.functional.pad(fields, (0, blocks * block - width))
    column = torch.arange(blocks) * block // weight.group
    scale = weight.scale[:, column].contiguous()
    zero = None if zero is None else zero[:, column]

    def plane(q: Tensor, s: Tensor, z: Tensor | None, bits: int) -> Plane:
        data = pack_fields(q, bits).reshape(rows, blocks, block * bits // 8)
        return Plane(data, s, None if z is None else pack_fields(z, bits))

    if integers:
        # A block of zeros is the difference of two equal sums, which need not vanish in float.
        used = torch.nn.functional.pad(weight.floats() != 0, (0, blocks * block - width))
        scale = scale * used.unflatten(1, (blocks, block)).any(-1)
    if bits < 8 or integers:
        return [plane(fields, scale, zero, bits)]
    low_zero = torch.zeros_like(scale, dtype=torch.uint8) if zero is None else zero & 15
    return [
        plane(fields >> 4, scale * 16, None if zero is None else zero >> 4, 4),
        plane(fields & 15, scale, low_zero, 4),
    ]
