"""`Grid`: a format with its scales, the numbers that one tensor may take; `QTensor`: with codes.

    q = clamp(round(x / s) + z, qmin, qmax)        x' = (q - z) * s        (affine integers)
    q = encode(x / s)                              x' = decode(q) * s      (every other element)

with z = 0 for symmetric formats. Rounding is half to even, as IEEE 754 and every peer does it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from qcompiler.formats.element import Element, Integer, Power
from qcompiler.formats.format import QFormat


@dataclass(frozen=True, eq=False)
class Grid:
    """The numbers that each element of a tensor may take."""

    format: QFormat
    scale: Tensor
    """float32, `format.scale_shape(shape)`; what the stored scales decode to."""
    zero: Tensor | None = None
    """int16 like `scale`, or float32 (HQQ); None when symmetric."""
    table: Tensor | None = None
    """A codebook's numbers in rising order, float32 (rows or 1, 2^bits)."""
    stored: QTensor | None = None
    """The scales as they are stored, if in less than float32."""

    @classmethod
    def of(cls, fmt: QFormat, scale: Tensor, zero: Tensor | None = None) -> Grid:
        """A grid with these scales (any shape that `fmt` has scales in), as `fmt` stores them."""
        scale = scale.float()
        if fmt.scale is None:
            return cls(fmt, scale, zero)
        inner = Grid.cover(*block_range(scale, fmt.scale), fmt.scale)
        kept = inner.quantize(scale)
        value = kept.dequantize()
        # A scale that is rounded to zero would make every number of its block zero, or NaN.
        value = torch.where(value == 0, inner.least(scale), value)
        kept = inner.quantize(value)
        return cls(fmt, kept.dequantize(), zero, None, kept)

    @classmethod
    def cover(cls, low: Tensor, high: Tensor, fmt: QFormat) -> Grid:
        """The grid that covers [low, high] (and zero), block by block.

        A block of zeros gets scale 1, so that it stays exactly zero and nothing divides by zero.
        Scales stop at float32's smallest normal number: below, they would lose their own precision.
        A range that is infinite or NaN is its scale, so that no number of its block looks sound.
        """
        if fmt.unscaled:
            return cls(fmt, torch.ones((1,) * low.ndim, device=low.device))
        if fmt.is_codebook:
            step = torch.linspace(0, 1, int(2**fmt.bits), device=low.device)
            low, high = low.float().reshape(-1, 1), high.float().reshape(-1, 1)
            return cls(fmt, torch.ones(1, device=low.device), None, low + (high - low) * step)
        low, high = low.float() * fmt.clip, high.float() * fmt.clip
        zero = None
        if fmt.symmetric:
            size = torch.maximum(low.abs(), high.abs())
            if _is_power(fmt.scale):
                return cls.of(fmt, torch.where(size == 0, 1.0, _power(size, fmt)))
            scale = _positive(size / fmt.top, size)
            if fmt.mirrored:  # the extreme has code qmin, which is negative
                scale = torch.where(high > -low, -scale, scale)
            return cls.of(fmt, scale)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (fmt.qmax - fmt.qmin)
        grid = cls.of(fmt, _positive(scale, high - low))
        zero = torch.round(fmt.qmin - low / grid.scale).clamp(fmt.qmin, fmt.qmax)
        return replace(grid, zero=zero.to(torch.int16))

    @classmethod
    def fit(cls, x: Tensor, fmt: QFormat) -> Grid:
        """The grid that covers the range of each block of `x`."""
        return cls.cover(*block_range(x, fmt), fmt)

    def least(self, like: Tensor) -> Tensor:
        """The number next to zero on the side of each number of `like`."""
        step = torch.full_like(like, _least(self.format.kind))
        step = step * spread(self.scale, tuple(like.shape), self.format)
        return torch.where(like < 0, -step, step)

    def codes(self, x: Tensor) -> Tensor:
        """Codes of `x`: numbers without a fraction in float32 or float64, or an integer type."""
        fmt, shape = self.format, tuple(x.shape)
        x = x if x.dtype == torch.float64 else x.float()
        if self.table is not None:
            return _nearest_of(x, self.table)
        u = x if fmt.unscaled else x / spread(self.scale, shape, fmt).to(x.dtype)
        return encode(u, None if self.zero is None else spread(self.zero, shape, fmt), fmt)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """What `codes` stand for, computed in float32 (float64 when asked for)."""
        if self.table is not None:
            rows = self.table.expand(codes.shape[0], -1)
            return rows.gather(1, codes.long().flatten(1)).reshape(codes.shape).to(dtype)
        return dequantize(codes, self.scale, self.zero, self.format, dtype)

    def round(self, x: Tensor) -> Tensor:
        """The nearest numbers of the grid, float32 (float64 for float64)."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return self.decode(self.codes(x), dtype)

    def quantize(self, x: Tensor) -> QTensor:
        """`x` by its nearest numbers."""
        return self.hold(self.codes(x))

    def hold(self, codes: Tensor) -> QTensor:
        """A tensor of this grid by its codes."""
        return QTensor(codes.to(torch.int16), self)

    def columns(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of each element of a matrix of this `shape`, expanded to it."""
        scale = spread(self.scale, shape, self.format).expand(shape)
        zero = self.zero
        return scale, None if zero is None else spread(zero, shape, self.format).expand(shape)


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized tensor: codes and their grid."""

    data: Tensor
    """Codes, one per element, unpacked: int16, the shape of the original."""
    grid: Grid

    @property
    def format(self) -> QFormat:
        return self.grid.format

    @property
    def scale(self) -> Tensor:
        return self.grid.scale

    @property
    def zero(self) -> Tensor | None:
        return self.grid.zero

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers, in the shape of `data`."""
        return self.grid.decode(self.data, dtype)

    @property
    def bytes(self) -> int:
        """Bytes of it with all side data, packed."""
        return self.format.bytes(tuple(self.data.shape))


def encode(u: Tensor, zero: Tensor | None, fmt: QFormat) -> Tensor:
    """Codes of numbers `u` in units of their scales; `zero` broadcasts against `u`."""
    if not fmt.is_integer:
        return fmt.kind.encode(u)
    if zero is None:
        return torch.round(u).clamp_(fmt.qmin, fmt.qmax)
    if zero.is_floating_point():  # a zero point between two numbers moves where rounding changes
        return torch.round(u + zero.to(u.dtype)).clamp_(fmt.qmin, fmt.qmax)
    return torch.round(u).add_(zero.to(u.dtype)).clamp_(fmt.qmin, fmt.qmax)


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, fmt: QFormat, dtype: torch.dtype
) -> Tensor:
    """x' in float32 (float64 when asked for), then cast once to `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = tuple(codes.shape)
    value = codes.to(wide) if fmt.is_integer else fmt.kind.decode(codes).to(wide)
    if zero is not None:
        value = value - spread(zero, shape, fmt).to(wide)
    if not fmt.unscaled:
        value = value * spread(scale, shape, fmt).to(wide)
    return value.to(dtype)


def spread(scale: Tensor, shape: tuple[int, ...], fmt: QFormat) -> Tensor:
    """Repeat each scale over its block, so that the result broadcasts against `shape`.

    Axes with one scale stay 1 long. A short last group is cut off at the end of its axis.
    A single scale serves any shape.
    """
    if scale.numel() == 1:
        return scale.reshape((1,) * len(shape))
    blocks = fmt.blocks(shape)
    for axis, (have, want, block) in enumerate(zip(scale.shape, shape, blocks, strict=True)):
        if have not in (1, want):
            scale = scale.repeat_interleave(block, axis).narrow(axis, 0, want)
    return scale


def block_range(x: Tensor, fmt: QFormat) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each block of `x`, both of shape `fmt.scale_shape(x.shape)`."""
    low = high = x
    for axis, block in enumerate(fmt.blocks(tuple(x.shape))):
        low, high = _reduce(low, axis, block, "amin"), _reduce(high, axis, block, "amax")
    return low, high


def _reduce(x: Tensor, axis: int, block: int, how: str) -> Tensor:
    """Reduce `axis` by blocks. A short last block is filled up with the last element, which changes
    neither minimum nor maximum."""
    size = x.shape[axis]
    if block == 1:
        return x
    if block == -1 or block >= size:
        return getattr(x, how)(axis, keepdim=True)  # type: ignore[no-any-return]
    blocks = -(-size // block)
    index = torch.arange(blocks * block, device=x.device).clamp_(max=size - 1)
    shape = (*x.shape[:axis], blocks, block, *x.shape[axis + 1 :])
    grouped = x.index_select(axis, index).reshape(shape)
    return getattr(grouped, how)(axis + 1)  # type: ignore[no-any-return]


def _nearest_of(x: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest number of each row's table."""
    rows = x.reshape(x.shape[0], -1).contiguous()
    bounds = ((table[:, 1:] + table[:, :-1]) / 2).to(x.dtype)
    found = torch.searchsorted(bounds.expand(rows.shape[0], -1).contiguous(), rows)
    return found.reshape(x.shape)


def _positive(scale: Tensor, size: Tensor) -> Tensor:
    """Scales of blocks of these sizes that can be divided by."""
    return torch.where(size == 0, 1.0, scale.clamp_min(torch.finfo(torch.float32).tiny))


def _is_power(fmt: QFormat | None) -> bool:
    return fmt is not None and isinstance(fmt.kind, Power)


def _power(size: Tensor, fmt: QFormat) -> Tensor:
    """2^(floor(log₂ max) - floor(log₂ top)): a scale of MX (OCP MX v1.0, section 6.3)."""
    exponent = torch.frexp(size).exponent - math.frexp(fmt.kind.top)[1]
    power = torch.exp2(exponent.clamp(-127, 127).double()).float()
    return power.where(size.isfinite(), torch.nan)


@lru_cache(maxsize=64)
def _least(kind: Element) -> float:
    """The smallest positive number of a kind; 1 of integers."""
    values = torch.ones(1) if isinstance(kind, Integer) else kind.values()
    return float(values[values > 0].min())
