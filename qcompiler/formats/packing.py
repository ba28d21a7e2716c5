"""Codes in bytes: along the last axis, low bits first, every row for itself."""

from __future__ import annotations

import torch
from torch import Tensor

TRITS = 5
"""Numbers -1, 0, 1 in one byte: 3⁵ = 243 of 256 are in use."""


def pack(q: Tensor, bits: int) -> Tensor:
    """Pack integers to `bits` each along the last axis, low bits first: uint8 (…, ceil(n·bits/8)).

    Negative numbers are stored in two's complement. With 4 bits it is "low nibble first".
    """
    width = q.shape[-1]
    if bits == 16:
        return q.to(torch.int16).contiguous().view(torch.uint8)
    # Eight numbers are `bits` octets: they meet in one 64-bit word, of which the low octets are it.
    q = torch.nn.functional.pad(q, (0, -width % 8))
    word = torch.zeros(*q.shape[:-1], q.shape[-1] // 8, dtype=torch.int64, device=q.device)
    for i in range(8):
        word |= (q[..., i::8].to(torch.int64) & (2**bits - 1)) << (bits * i)
    octets = word.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)
    return octets[..., : -(-width * bits // 8)].contiguous()


def unpack(packed: Tensor, bits: int, width: int, signed: bool) -> Tensor:
    """The inverse of `pack`: int16 (…, width)."""
    # Without views of other types, which ONNX does not have.
    if bits == 16:
        return packed[..., ::2].to(torch.int16) | packed[..., 1::2].to(torch.int16) << 8
    # Number i of each eight lies in one octet or in two.
    octets = torch.nn.functional.pad(packed, (0, 8 * bits)).to(torch.int32)
    words = -(-width // 8)
    eighths = []
    for first in range(0, 8 * bits, bits):
        octet, shift = divmod(first, 8)
        part = octets[..., octet::bits][..., :words]
        if shift + bits > 8:
            part = part | octets[..., octet + 1 :: bits][..., :words] << 8
        eighths.append((part >> shift & 2**bits - 1).to(torch.int16))
    q = torch.stack(eighths, -1).flatten(-2)[..., :width]
    if signed:
        q = torch.where(q >= 2 ** (bits - 1), q - 2**bits, q)
    return q.contiguous()


def pack_planes(q: Tensor, bits: int) -> Tensor:
    """Bit-planes: bit 0 of all numbers, then bit 1, …: uint8 (…, bits · ceil(n/8))."""
    planes = [pack((q.to(torch.int64) >> b) & 1, 1) for b in range(bits)]
    return torch.cat(planes, -1)


def unpack_planes(packed: Tensor, bits: int, width: int, signed: bool) -> Tensor:
    """The inverse of `pack_planes`: int16 (…, width)."""
    planes = packed.reshape(*packed.shape[:-1], bits, -(-width // 8))
    q = torch.zeros(*packed.shape[:-1], width, dtype=torch.int16, device=packed.device)
    for b in range(bits):
        q |= unpack(planes[..., b, :], 1, width, False) << b
    return torch.where(q >= 2 ** (bits - 1), q - 2**bits, q) if signed else q


def pack_ternary(q: Tensor) -> Tensor:
    """Five numbers -1, 0, 1 in one byte, the first one lowest: uint8 (…, ceil(n/5))."""
    q = torch.nn.functional.pad(q.to(torch.int64) + 1, (0, -q.shape[-1] % TRITS), value=1)
    packed: Tensor = (q.unflatten(-1, (-1, TRITS)) * _powers(q)).sum(-1).to(torch.uint8)
    return packed


def unpack_ternary(packed: Tensor, width: int) -> Tensor:
    """The inverse of `pack_ternary`: int16 (…, width)."""
    trits = packed.to(torch.int64).unsqueeze(-1) // _powers(packed) % 3
    return (trits.flatten(-2)[..., :width] - 1).to(torch.int16)


def _powers(q: Tensor) -> Tensor:
    return torch.tensor([3**i for i in range(TRITS)], device=q.device)
