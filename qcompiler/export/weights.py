"""Stored weights, unpacked into the layouts that ONNX operators read. Tensors in, tensors out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from qcompiler.formats import QFormat


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
        """From the parameters of a `qc::dequantize` node; axes in front of the last are rows."""
        fmt, width = QFormat.parse(str(node.args[3])), node.args[4]
        assert isinstance(width, int)
        shape = (*data.shape[:-1], scale.shape[-1])

        def rows(values: Tensor) -> Tensor:
            return values.expand(shape).reshape(-1, shape[-1])

        numbers = fmt.unpack(data, width).reshape(-1, width)
        return cls(name, fmt, numbers, rows(scale.float()), None if zero is None else rows(zero))

    @property
    def group(self) -> int:
        """Neighbours in a row that share a scale."""
        return group_of(self.format, self.data.shape[1])

    @property
    def nibbles(self) -> bool:
        """Whether the numbers are written in 4 bits. Groups of odd size are not, nor a short last
        one: OpenVINO (2026.4) reads two numbers at a time, and past the end of each group, and
        divides by zero where it spells groups out."""
        even = self.group % 2 == 0 and self.data.shape[1] % self.group == 0
        return self.format.bits <= 4 and even

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.format.signed else torch.uint8

    def floats(self) -> Tensor:
        """(q - z) * s in float32, (N, K)."""
        column = torch.arange(self.data.shape[1]) // self.group
        q = self.data if self.zero is None else self.data - self.zero[:, column]
        return q.float() * self.scale[:, column]


def group_of(fmt: QFormat, width: int) -> int:
    """Neighbours in a row of `width` that share a scale."""
    group = fmt.blocks((1, width))[1]
    return width if group == -1 else min(group, width)


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


def as_unsigned(weight: Weight) -> Weight:
    """The same 8 bit numbers as q + 128 with zero points 128 higher."""
    if weight.format.element != "int8":
        return weight
    zero = torch.zeros_like(weight.scale, dtype=torch.int16) if weight.zero is None else weight.zero
    fmt = replace(weight.format, element="uint8", symmetric=False, full=False, mirrored=False)
    return replace(weight, format=fmt, data=weight.data + 128, zero=zero + 128)
