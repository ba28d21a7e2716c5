"""`QFormat`: how one tensor is stored, as data and as text."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from torch import Tensor

from qcompiler.errors import BadInput, unknown
from qcompiler.formats import packing
from qcompiler.formats.element import Codebook, Element, Half, Integer, Power, Ternary, element

TABLE_BYTES = 4
"""Bytes in which a number of a codebook is stored."""
NAMED_BLOCKS = {"tensor": None, "channel": (-1,), "token": (-1,), "sample": (-1, -1, -1)}
ALIASES = {
    "mxfp4": "fp4_e2m1:group32:scale(e8m0)",
    "mxfp6_e2m3": "fp6_e2m3:group32:scale(e8m0)",
    "mxfp6_e3m2": "fp6_e3m2:group32:scale(e8m0)",
    "mxfp8_e4m3": "fp8_e4m3:group32:scale(e8m0)",
    "mxfp8_e5m2": "fp8_e5m2:group32:scale(e8m0)",
    "mxint8": "int8:group32:full:scale(e8m0)",
    "nvfp4": "fp4_e2m1:group16:scale(fp8_e4m3:tensor)",
    "dyadic": "int16:tensor:scale(e8m0)",
}
"""Formats with names of their own: OCP MX v1.0, NVIDIA's NVFP4, scales m/2^k (HAWQ-V3)."""


@dataclass(frozen=True)
class QFormat:
    """How one tensor is stored.

    `block` lists, for the *trailing* axes, how many neighbours share a scale: -1 is the whole axis,
    and axes further left have one scale per index. `(-1,)` is per output channel of a linear weight
    (out, in) and per token of an activation (…, features); `(128,)` is groups of 128, of which the
    last may be short; `None` is one scale for the whole tensor.
    """

    element: str
    """Which numbers there are in units of the scale (see `element.py`)."""
    block: tuple[int, ...] | None = None
    symmetric: bool = True
    """No zero point; the range of a signed integer is then narrowed to ±qmax."""
    dynamic: bool = False
    """Scales are computed from each tensor as it comes (activations only)."""
    full: bool = False
    """Symmetric with the whole range, -8 … 7 with s = max|x| / 7.5: a step of 1/15 instead of 1/14
    of the range, for which the largest positive number is cut off by half a step."""
    mirrored: bool = False
    """Symmetric with the whole range, and scales of either sign: the extreme of each block is at
    qmin exactly, s = x_extreme / qmin (gguf's Q4_0), a step of 1/16 of the range. The other end is
    cut off where it comes as near to the extreme."""
    scale: QFormat | None = None
    """How the scales themselves are stored; None is float32."""
    clip: float = 1.0
    """Share of its range that a dynamic scale covers; what lies outside saturates."""
    planes: bool = False
    """Stored as bit-planes."""
    unscaled: bool = False
    """No scale: the numbers of the element as they are."""

    def __post_init__(self) -> None:
        if not isinstance(self.element, str) or isinstance(self.block, str):
            raise BadInput(
                f"a format has the name of an element and sizes of blocks, as in QFormat('int8', "
                f"(-1,)), or is parsed from text; found {self.element!r}, {self.block!r}"
            )
        kind = element(self.element)
        for size in self.block or ():
            if size != -1 and size < 1:
                raise BadInput(f"a block size is positive or -1 (whole axis), found {size}")
        if not self.symmetric and (not isinstance(kind, Integer) or isinstance(kind, Ternary)):
            raise BadInput(f"{self.element} has no zero point; leave out `asym`")
        if self.full and not (self.symmetric and self._is_signed_integer):
            raise BadInput(
                f"`full` is for signed integers without a zero point; found {self.element}"
                + ("" if self.symmetric else ":…:asym, which has the full range already")
            )
        if self.mirrored and (self.full or not (self.symmetric and self._is_signed_integer)):
            raise BadInput(
                f"`mirrored` is for signed integers, in place of `full` and `asym`; found {self}"
            )
        if self.mirrored and self.scale is not None and not self.scale.signed:
            raise BadInput(f"scales of `mirrored` have signs, which {self.scale} cannot store")
        if self.symmetric and self.element == "int1" and not self.unscaled:
            raise BadInput("int1 without a zero point is 0 alone; write `binary` for ±1")
        if self.clip != 1.0 and not (self.dynamic and 0 < self.clip < 1):
            raise BadInput(f"a clipping ratio is between 0 and 1, of a dynamic format: {self.clip}")
        if isinstance(kind, Codebook) and (self.dynamic or self.block not in (None, (-1,))):
            raise BadInput(f"{self.element} has one table for each channel or for the tensor")
        if isinstance(kind, Codebook) and self.scale is not None:
            raise BadInput(f"{self.element} has no scales of its own; leave out `scale(…)`")
        if isinstance(kind, Half | Power) and not self.unscaled:
            raise BadInput(f"{self.element} has no scale; write it alone")
        if self.unscaled and (self.block or self.scale or self.dynamic or not self.symmetric):
            raise BadInput(f"an unscaled {self.element} has no block, scale or zero point")
        if self.scale is not None and (self.scale.dynamic or self.scale.is_codebook):
            raise BadInput(f"scales can be stored in a plain format, not in {self.scale}")

    @cached_property
    def kind(self) -> Element:
        return element(self.element)

    @property
    def is_integer(self) -> bool:
        """Codes are integers, with (q - z) * s for what they stand for."""
        return isinstance(self.kind, Integer)

    @property
    def is_codebook(self) -> bool:
        return isinstance(self.kind, Codebook)

    @property
    def decoded(self) -> QFormat:
        """The format once codes are unpacked and scales are float32."""
        return replace(self, scale=None, planes=False)

    @property
    def _is_signed_integer(self) -> bool:
        return self.element.startswith("int")

    @property
    def bits(self) -> int:
        """Bits of a code, unpacked."""
        return self.kind.bits

    @property
    def signed(self) -> bool:
        """Whether codes are two's complement."""
        return self.kind.signed

    @property
    def qmin(self) -> int:
        """Smallest code."""
        if self.element == "ternary":
            return -1
        if not self.signed:
            return 0
        whole = self.full or self.mirrored or self.unscaled
        narrow = self.symmetric and self.is_integer and not whole
        return int(-(1 << (self.bits - 1)) + (1 if narrow else 0))

    @property
    def qmax(self) -> int:
        """Largest code."""
        if self.element == "ternary":
            return 1
        return int((1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1)

    @property
    def top(self) -> float:
        """What the largest magnitude of a block is scaled to."""
        if self.mirrored:
            return -self.qmin
        return (self.qmax - self.qmin) / 2 if self.full else self.kind.top

    def __str__(self) -> str:
        """`int4:group128`, `int8:token:dynamic`, `fp4_e2m1:group32:scale(e8m0)`: parses back."""
        words = [self.element]
        if self.unscaled:
            words += [] if isinstance(self.kind, Half | Power) else ["unscaled"]
        elif self.block is None:
            words += ["tensor"]
        elif self.block == (-1,):
            words += ["token" if self.dynamic else "channel"]
        elif self.block == NAMED_BLOCKS["sample"]:
            words += ["sample"]
        elif len(self.block) == 1:
            words += [f"group{self.block[0]}"]
        else:
            words += ["block" + "x".join("*" if b == -1 else str(b) for b in self.block)]
        words += [] if self.symmetric else ["asym"]
        words += ["dynamic"] if self.dynamic else []
        words += ["full"] if self.full else []
        words += ["mirrored"] if self.mirrored else []
        words += [f"clip{self.clip}"] if self.clip != 1.0 else []
        words += ["planes"] if self.planes else []
        words += [f"scale({self.scale})"] if self.scale is not None else []
        return ":".join(words)

    @classmethod
    def parse(cls, text: str) -> QFormat:
        """The inverse of `str`. `ValueError` never escapes: a bad text is a `BadInput`."""
        return _parse_format(text)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale tensor of a tensor of this `shape`; a last group may be short."""
        if self.block is None:
            return (1,) * len(shape)
        return tuple(
            1 if b == -1 else -(-n // b) for n, b in zip(shape, self.blocks(shape), strict=True)
        )

    def blocks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Neighbours that share a scale, along each axis of `shape`; -1 is the whole axis."""
        if self.block is None:
            return (-1,) * len(shape)
        block = self.block[-len(shape) :] if len(self.block) > len(shape) else self.block
        return (1,) * (len(shape) - len(block)) + block

    @property
    def by_rows(self) -> QFormat:
        """The format of a kernel's rows (out, in · taps): a kernel has one scale a row, or one."""
        plain = self.block is None or len(self.block) == 1
        return self if plain else replace(self, block=(-1,))

    @property
    def zeros(self) -> QFormat:
        """How zero points are stored, which are codes like any other."""
        return QFormat(self.element, unscaled=True)

    def pack(self, codes: Tensor) -> Tensor:
        """Codes (…, n) in bytes, uint8 (…, bytes of a row)."""
        if self.element == "ternary":
            return packing.pack_ternary(codes)
        if self.planes:
            return packing.pack_planes(codes, self.bits)
        return packing.pack(codes, self.bits)

    def unpack(self, packed: Tensor, width: int) -> Tensor:
        """The inverse of `pack`: int16 (…, width)."""
        if self.element == "ternary":
            return packing.unpack_ternary(packed, width)
        if self.planes:
            return packing.unpack_planes(packed, self.bits, width, self.signed)
        return packing.unpack(packed, self.bits, width, self.signed)

    def row_bytes(self, width: int) -> int:
        """Bytes of a packed row of `width` codes."""
        if self.element == "ternary":
            return -(-width // packing.TRITS)
        if self.planes:
            return self.bits * -(-width // 8)
        return -(-width * self.bits // 8)

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the packed data with all side data (scales, zero points, tables) counted."""
        width = shape[-1] if shape else 1
        data = _numel(shape[:-1]) * self.row_bytes(width)
        if self.unscaled:
            return data
        scales = self.scale_shape(shape)
        if self.is_codebook:
            return data + _numel(scales) * int(2**self.bits) * TABLE_BYTES
        side = self.scale.bytes(scales) if self.scale is not None else 4 * _numel(scales)
        zeros = 0 if self.symmetric else self.zeros.bytes(scales)
        return data + side + zeros

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """`bytes` in bits, for each number of a tensor of this `shape`."""
        return 8 * self.bytes(shape) / max(_numel(shape), 1)


@lru_cache(maxsize=256)
def _parse_format(text: str) -> QFormat:
    text = text.strip()
    head, _, rest = text.partition(":")
    if head in ALIASES:
        text = ALIASES[head] + (f":{rest}" if rest else "")
    first, *words = _split(text)
    kind = element(first)
    given: dict[str, object] = {}
    for word in words:
        key, value = _parse_word(word)
        if key in given:
            raise BadInput(f"format {text!r} says twice what its {key} is; leave one of them out")
        given[key] = value
    if isinstance(kind, Half | Power):
        given["unscaled"] = True
    if words and "block" not in given and "unscaled" not in given:
        raise BadInput(f"format {text!r} names no block; one of {', '.join(NAMED_BLOCKS)}, groupN")
    return QFormat(first, **given)  # type: ignore[arg-type]


def _parse_word(word: str) -> tuple[str, object]:
    """A word as (field, value)."""
    if word == "asym":
        return "symmetric", False
    if word in ("dynamic", "full", "mirrored", "planes", "unscaled"):
        return word, True
    if word in NAMED_BLOCKS:
        return "block", NAMED_BLOCKS[word]
    if match := re.fullmatch(r"group(\d+)", word):
        return "block", (int(match[1]),)
    if match := re.fullmatch(r"block([\d*]+(?:x[\d*]+)*)", word):
        return "block", tuple(-1 if b == "*" else int(b) for b in match[1].split("x"))
    if match := re.fullmatch(r"clip(\d*\.?\d+(?:e-\d+)?)", word):
        return "clip", float(match[1])
    if match := re.fullmatch(r"scale\((.*)\)", word):
        return "scale", _parse_format(match[1])
    known = ["asym", "dynamic", "full", "mirrored", "planes", "scale(fp16)", "clip0.9", "group128"]
    raise unknown("word in a format", word, [*known, *NAMED_BLOCKS])


def _split(text: str) -> list[str]:
    """At colons that are in no brackets."""
    words, depth = [""], 0
    for c in text:
        depth += (c == "(") - (c == ")")
        if c == ":" and depth == 0:
            words.append("")
        else:
            words[-1] += c
    return words


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


@dataclass(frozen=True)
class Scheme:
    """What a site stores and computes in: a linear, convolution or embedding, or attention."""

    weight: QFormat | None = None
    activation: QFormat | None = None
    key: QFormat | None = None
    """Of attention: its keys, before their rotary embedding."""
    value: QFormat | None = None
    """Of attention: its values."""
    probabilities: QFormat | None = None
    """Of attention: what its softmax yields."""

    @property
    def attention(self) -> dict[str, QFormat]:
        """The parts of attention that are rounded."""
        parts = {"key": self.key, "value": self.value, "probabilities": self.probabilities}
        return {k: v for k, v in parts.items() if v is not None}

    def __str__(self) -> str:
        if self.attention:
            return " ".join(f"{k}={v}" for k, v in self.attention.items())
        return f"weight={self.weight or 'float'} activation={self.activation or 'float'}"
