"""How codes of a weight lie in memory for generated kernels: the same for every instruction set.

    weight (out, in)  →  blocks of 16 outputs × chunks of 32 inputs, one chunk after the other

A chunk of b-bit codes is 64 b bytes: vectors of 16 lanes of 32 bits, a lane for each output, with
the codes of four neighbouring inputs in its four bytes. That is what a dot product instruction
wants: inputs are broadcast four at a time, and nothing is ever summed across lanes.

    4 bits:  byte j of lane n = code[n, 8i + j] | code[n, 8i + 4 + j] << 4        (vector i of 4)

8 steps of four inputs make a chunk. A byte holds 8 / p steps of a plane of p = 8, 4, 2 or 1 bits;
other widths are made of planes, low bits first: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1.
Codes are unsigned, q + 2^(b-1) for signed formats. Padding has the code of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

OUTPUTS = 16
"""Outputs in a block."""
CHUNK = 32
"""Inputs in a chunk."""
STEPS = 8
"""Steps of four inputs in a chunk."""
PLANES = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}
"""Bits of a code → bits of its planes, low bits first."""


def padded(size: int, unit: int) -> int:
    """`size` rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


def pack(codes: Tensor, bits: int, fill: int) -> Tensor:
    """Unsigned codes (out, in), 0 … 2^bits - 1, to uint8 (blocks, chunks, 64 bits)."""
    out, width = codes.shape
    full = torch.full((padded(out, OUTPUTS), padded(width, CHUNK)), fill, dtype=torch.uint8)
    full[:out, :width] = codes.to(torch.uint8)
    blocks, chunks = full.shape[0] // OUTPUTS, full.shape[1] // CHUNK
    steps = full.reshape(blocks, OUTPUTS, chunks, STEPS, 4).permute(0, 2, 3, 1, 4)
    parts, base = [], 0
    for plane in PLANES[bits]:
        per = 8 // plane
        part = (steps >> base & (1 << plane) - 1).reshape(blocks, chunks, STEPS // per, per, 64)
        shift = (torch.arange(per, dtype=torch.uint8) * plane).reshape(per, 1)
        parts.append((part << shift).sum(3, dtype=torch.uint8).flatten(2))
        base += plane
    return torch.cat(parts, -1).contiguous()


def unpack(packed: Tensor, bits: int, out: int, width: int) -> Tensor:
    """The inverse of `pack`: uint8 (out, width)."""
    blocks, chunks = packed.shape[:2]
    steps = torch.zeros(blocks, chunks, STEPS, 64, dtype=torch.uint8)
    at = base = 0
    for plane in PLANES[bits]:
        per, size = 8 // plane, 64 * plane
        part = packed[..., at : at + size].reshape(blocks, chunks, STEPS // per, 1, 64)
        shift = (torch.arange(per, dtype=torch.uint8) * plane).reshape(per, 1)
        steps |= (part >> shift & (1 << plane) - 1).reshape(blocks, chunks, STEPS, 64) << base
        at, base = at + size, base + plane
    full = steps.reshape(blocks, chunks, STEPS, OUTPUTS, 4).permute(0, 3, 1, 2, 4)
    return full.reshape(blocks * OUTPUTS, chunks * CHUNK)[:out, :width]


def pack_side(side: Tensor, out: int) -> Tensor:
    """Numbers of each output and group, (out, groups), to (blocks, groups, 16); padding is 0."""
    full = torch.zeros(padded(out, OUTPUTS), side.shape[1], dtype=side.dtype)
    full[:out] = side
    return full.reshape(-1, OUTPUTS, side.shape[1]).transpose(1, 2).contiguous()
