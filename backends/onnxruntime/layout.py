"""Weights in the layouts that ONNX Runtime's kernels read. Tensors in, tensors out; no graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompiler.formats import QFormat, spread, unpack

BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes of `MatMulNBits`."""


@dataclass(frozen=True)
class Weight:
    """A weight as the program stores it, unpacked."""

    name: str
    format: QFormat
    data: Tensor
    """int16 (N, K): rows are output channels, or entries of a table."""
    scale: Tensor
    """float32 (N, groups)."""
    zero: Tensor | None
    """int16 like `scale`."""

    @classmethod
    def of(
        cls, node: fx.Node, name: str, data: Tensor, scale: Tensor, zero: Tensor | None
    ) -> Weight:
        """From the parameters of a `qc::dequantize` node."""
        fmt = QFormat.parse(str(node.args[3]))
        width = node.args[4]
        assert isinstance(width, int)
        rows = unpack(data, fmt.bits, width, fmt.signed)
        spread = scale.float().expand(len(rows), -1)  # one scale for all rows becomes one for each
        return cls(name, fmt, rows, spread, None if zero is None else zero.expand(len(rows), -1))

    @property
    def group(self) -> int:
        """Neighbours in a row that share a scale."""
        return group_of(self.format, self.data.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.format.signed else torch.uint8


def group_of(fmt: QFormat, width: int) -> int:
    """Neighbours in a row of `width` that share a scale, as the reference spreads scales."""
    numbers = torch.arange(fmt.scale_shape((1, width))[1]).reshape(1, -1)
    return int((spread(numbers, (1, width)).expand(1, width) == 0).sum())


def container(bits: int) -> int:
    """The field that `bits` are stored in: 2, 4 or 8 bits wide."""
    return next(c for c in (2, 4, 8) if bits <= c)


def unsigned(weight: Weight) -> tuple[Tensor, Tensor | None]:
    """Numbers that fill the container, and their zero points where they are not its middle."""
    middle = 2 ** (container(weight.format.bits) - 1)
    offset = middle if weight.format.signed else 0
    zero = weight.zero
    if zero is not None:
        zero = (zero + offset).to(torch.uint8)
        zero = None if bool((zero == middle).all()) else zero
    return (weight.data + offset).to(torch.uint8), zero


def pack_fields(fields: Tensor, bits: int, fill: int = 0) -> Tensor:
    """uint8 (…, n) to (…, ceil(n·bits/8)), low bits first; a short last byte gets `fill`."""
    per_byte = 8 // bits
    missing = -fields.shape[-1] % per_byte
    fields = torch.nn.functional.pad(fields, (0, missing), value=fill)
    packed = torch.zeros_like(fields[..., ::per_byte])
    for k in range(per_byte):
        packed |= fields[..., k::per_byte] << (k * bits)
    return packed


def block_of(fmt: QFormat, width: int) -> int | None:
    """Block size with which `MatMulNBits` can express the format's groups; None if it cannot."""
    group, bits = group_of(fmt, width), container(fmt.bits)
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


def planes(weight: Weight, block: int) -> list[Plane]:
    """The weight for `MatMulNBits`: one plane of 2 or 4 bits, or two of 4 for an 8 bit one.

    q - z = 16 (q_high - z_high) + (q_low - z_low). The kernel for 8 bits has float arithmetic only
    as a copy of the weight in float at each run, which makes one token ten times slower.
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

    if bits < 8:
        return [plane(fields, scale, zero, bits)]
    low_zero = torch.zeros_like(scale, dtype=torch.uint8) if zero is None else zero & 15
    return [
        plane(fields >> 4, scale * 16, None if zero is None else zero >> 4, 4),
        plane(fields & 15, scale, low_zero, 4),
    ]
