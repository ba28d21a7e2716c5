"""How a tensor is stored at low precision: formats, schemes, and quantized tensors.

A `QFormat` is data. It says which numbers exist and which elements share a scale, never how the
scale was found (that is a quantizer's business) nor which kernel reads it (a backend's).

Affine integer quantization, for a block of elements x that share a scale s and a zero point z::

    q = clamp(round(x / s) + z, qmin, qmax)        x' = (q - z) * s

with z = 0 for symmetric formats. Rounding is half to even, as IEEE 754 and every peer does it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from qcompiler.errors import BadInput, unknown

ZERO_BYTES = 2
"""Bytes in which a zero point is stored."""
NAMED_BLOCKS = {"tensor": None, "channel": (-1,), "token": (-1,), "sample": (-1, -1, -1)}


@dataclass(frozen=True)
class QFormat:
    """How one tensor is stored.

    `block` lists, for the *trailing* axes, how many neighbours share a scale: -1 is the whole axis,
    and axes further left have one scale per index. `(-1,)` is per output channel of a linear weight
    (out, in) and per token of an activation (…, features); `(128,)` is groups of 128; `None` is one
    scale for the whole tensor.
    """

    element: str
    """`int2` … `int8` (signed) or `uint2` … `uint8`."""
    block: tuple[int, ...] | None = None
    symmetric: bool = True
    """No zero point; the range of a signed element is then narrowed to ±qmax."""
    dynamic: bool = False
    """Scales are computed from each tensor as it comes (activations only)."""
    full: bool = False
    """Symmetric with the whole range, -8 … 7 with s = max|x| / 7.5: a step of 1/15 instead of 1/14
    of the range, for which the largest positive number is cut off by half a step."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"u?int[2-8]", self.element):
            raise unknown("element type", self.element, [f"int{b}" for b in range(2, 9)])
        for size in self.block or ():
            if size != -1 and size < 1:
                raise BadInput(f"a block size is positive or -1 (whole axis), found {size}")
        if self.symmetric and self.element.startswith("u"):
            raise BadInput(f"{self.element} has no negative numbers; write `{self.element}:…:asym`")
        if self.full and not self.symmetric:
            raise BadInput(
                "a format with a zero point has the full range already; leave out `full`"
            )

    @cached_property
    def bits(self) -> int:
        return int(self.element.removeprefix("u").removeprefix("int"))

    @property
    def signed(self) -> bool:
        return not self.element.startswith("u")

    @property
    def qmin(self) -> int:
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + (1 if self.symmetric and not self.full else 0)

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    def __str__(self) -> str:
        """`int4:group128`, `int8:token:dynamic`, `uint8:tensor:asym`: text that parses back."""
        if self.block is None:
            block = "tensor"
        elif self.block == (-1,):
            block = "token" if self.dynamic else "channel"
        elif self.block == NAMED_BLOCKS["sample"]:
            block = "sample"
        elif len(self.block) == 1:
            block = f"group{self.block[0]}"
        else:
            block = "block" + "x".join("*" if b == -1 else str(b) for b in self.block)
        words = [self.element, block]
        words += [] if self.symmetric else ["asym"]
        words += ["dynamic"] if self.dynamic else []
        words += ["full"] if self.full else []
        return ":".join(words)

    @classmethod
    def parse(cls, text: str) -> QFormat:
        """The inverse of `str`. `ValueError` never escapes: a bad text is a `BadInput`."""
        return _parse_format(text)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale tensor of a tensor of this `shape`; a last group may be short."""
        if self.block is None:
            return (1,) * len(shape)
        block = self.block[-len(shape) :] if len(self.block) > len(shape) else self.block
        full = (1,) * (len(shape) - len(block)) + block
        return tuple(1 if b == -1 else -(-n // b) for n, b in zip(shape, full, strict=True))

    def bytes(self, shape: tuple[int, ...], scale_bytes: int = 4) -> int:
        """Bytes of the packed data with all side data (scales, zero points) counted."""
        rows, width = _rows(shape)
        data = rows * -(-width * self.bits // 8)
        scales = _numel(self.scale_shape(shape))
        return data + scales * (scale_bytes + (0 if self.symmetric else ZERO_BYTES))


@lru_cache(maxsize=256)
def _parse_format(text: str) -> QFormat:
    element, *words = text.strip().split(":")
    block: tuple[int, ...] | None = None
    symmetric, dynamic, full, seen_block = True, False, False, False
    for word in words:
        if word == "asym":
            symmetric = False
        elif word == "dynamic":
            dynamic = True
        elif word == "full":
            full = True
        elif word in NAMED_BLOCKS:
            block, seen_block = NAMED_BLOCKS[word], True
        elif match := re.fullmatch(r"group(\d+)", word):
            block, seen_block = (int(match[1]),), True
        elif match := re.fullmatch(r"block([\d*]+(?:x[\d*]+)*)", word):
            block = tuple(-1 if b == "*" else int(b) for b in match[1].split("x"))
            seen_block = True
        else:
            raise unknown(
                "word in a format", word, ["asym", "dynamic", "full", "group128", *NAMED_BLOCKS]
            )
    if words and not seen_block:
        raise BadInput(f"format {text!r} names no block; one of {', '.join(NAMED_BLOCKS)}, groupN")
    return QFormat(element, block, symmetric, dynamic, full)


@dataclass(frozen=True)
class Scheme:
    """What a site (one linear, convolution or embedding) stores and computes in."""

    weight: QFormat | None = None
    activation: QFormat | None = None

    def __str__(self) -> str:
        return f"weight={self.weight or 'float'} activation={self.activation or 'float'}"


@dataclass(frozen=True)
class QTensor:
    """A quantized tensor: `data` (integers, one per element, unpacked), `scale`, `zero`."""

    data: Tensor
    """int16, the shape of the original."""
    scale: Tensor
    """float32, `format.scale_shape(data.shape)`."""
    zero: Tensor | None
    """int16 like `scale`, or None when symmetric."""
    format: QFormat

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """x' = (q - z) * s, shape of `data`."""
        return dequantize(self.data, self.scale, self.zero, dtype)


def spread(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Repeat each scale over its block, so that the result broadcasts against `shape`.

    Axes with one scale stay 1 long. A short last group is cut off at the end of its axis.
    A single scale serves any shape.
    """
    if scale.numel() == 1:
        return scale.reshape((1,) * len(shape))
    for axis, (have, want) in enumerate(zip(scale.shape, shape, strict=True)):
        if have not in (1, want):
            block = -(-want // have)
            scale = scale.repeat_interleave(block, axis).narrow(axis, 0, want)
    return scale


def quantize(x: Tensor, scale: Tensor, zero: Tensor | None, fmt: QFormat) -> Tensor:
    """q = clamp(round(x / s) + z); x and result share a shape; result keeps x's dtype."""
    scale = spread(scale, tuple(x.shape)).to(x.dtype)
    q = torch.round(x / scale)
    if zero is not None:
        q = q + spread(zero, tuple(x.shape)).to(x.dtype)
    return q.clamp_(fmt.qmin, fmt.qmax)


def dequantize(q: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x' = (q - z) * s in float32 (float64 when asked for), then cast once to `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    value = q.to(wide)
    if zero is not None:
        value = value - spread(zero, tuple(q.shape)).to(wide)
    return (value * spread(scale, tuple(q.shape)).to(wide)).to(dtype)


def range_to_scale(low: Tensor, high: Tensor, fmt: QFormat) -> tuple[Tensor, Tensor | None]:
    """Scale (float32) and zero point that let `fmt` cover [low, high] (and zero).

    A block of zeros gets scale 1, so that it stays exactly zero and nothing divides by zero.
    """
    if fmt.symmetric:
        scale = torch.maximum(low.abs(), high.abs()).float() * 2 / (fmt.qmax - fmt.qmin)
        return torch.where(scale > 0, scale, torch.ones_like(scale)), None
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    scale = (high - low) / (fmt.qmax - fmt.qmin)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.round(fmt.qmin - low / scale).clamp(fmt.qmin, fmt.qmax)
    return scale, zero.to(torch.int16)


def block_range(x: Tensor, fmt: QFormat) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each block of `x`, both of shape `fmt.scale_shape(x.shape)`."""
    low = high = x
    for axis, blocks in enumerate(fmt.scale_shape(tuple(x.shape))):
        low, high = _reduce(low, axis, blocks, "amin"), _reduce(high, axis, blocks, "amax")
    return low, high


def _reduce(x: Tensor, axis: int, blocks: int, how: str) -> Tensor:
    """Reduce `axis` to `blocks` values. A short last block is filled up with its last element,
    which changes neither minimum nor maximum."""
    size = x.shape[axis]
    if blocks == size:
        return x
    if blocks == 1:
        return getattr(x, how)(axis, keepdim=True)  # type: ignore[no-any-return]
    block = -(-size // blocks)
    index = torch.arange(blocks * block, device=x.device).clamp_(max=size - 1)
    shape = (*x.shape[:axis], blocks, block, *x.shape[axis + 1 :])
    grouped = x.index_select(axis, index).reshape(shape)
    return getattr(grouped, how)(axis + 1)  # type: ignore[no-any-return]


def pack(q: Tensor, bits: int) -> Tensor:
    """Pack integers to `bits` each along the last axis, low bits first: uint8 (…, ceil(n·bits/8)).

    Negative numbers are stored in two's complement. With 4 bits it is "low nibble first".
    """
    width = q.shape[-1]
    # Eight numbers are `bits` octets: they meet in one 64-bit word, of which the low octets are it.
    q = torch.nn.functional.pad(q, (0, -width % 8))
    word = torch.zeros(*q.shape[:-1], q.shape[-1] // 8, dtype=torch.int64, device=q.device)
    for i in range(8):
        word |= (q[..., i::8].to(torch.int64) & (2**bits - 1)) << (bits * i)
    octets = word.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)
    return octets[..., : -(-width * bits // 8)].contiguous()


def unpack(packed: Tensor, bits: int, width: int, signed: bool) -> Tensor:
    """The inverse of `pack`: int16 (…, width)."""
    if bits == 8:
        return (packed.view(torch.int8) if signed else packed).to(torch.int16)
    octets = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits))
    octets = octets.reshape(*octets.shape[:-1], -1, bits)
    word = torch.nn.functional.pad(octets, (0, 8 - bits)).view(torch.int64)  # (…, words, 1)
    shifts = torch.arange(0, 8 * bits, bits, device=packed.device)
    q: Tensor = ((word >> shifts) & (2**bits - 1)).to(torch.int16).flatten(-2)[..., :width]
    if signed:
        q = torch.where(q >= 2 ** (bits - 1), q - 2**bits, q)
    return q.contiguous()


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    return _numel(shape[:-1]), shape[-1] if shape else 1


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
