"""Elements: the numbers that one code can stand for, in units of the scale.

An element is a finite set of numbers with a rule of rounding. It knows no scale, no block and no
tensor layout; `QFormat` adds those. `top` is the number that the largest magnitude of a block is
scaled to.

=====================  ===========================================================================
`int2` … `int8`, 16    affine integers; `uint1` … `uint8`, `int1` with a zero point
`ternary` `binary`     -1, 0, 1 (five in a byte) and -1, 1
`mid2` `mid3` `mid4`   half-odd numbers, ±½, ±1½ …: balanced levels without a zero (ParetoQ 2025)
`fp8_e4m3` …           any `fpB_eEmM`: sign, E exponent bits, M mantissa bits (OCP MX v1.0)
`fp16` `bf16` `e8m0`   what scales are stored in; `e8m0` is 2^k
`nf2` `nf3` `nf4`      quantiles of a normal distribution (QLoRA, Dettmers et al. 2023)
`pot3` … `pot8`        0 and ±2^-k (power of two)
`log1` … `log7`        2^-k, for numbers from 0 to 1 (FQ-ViT, Lin et al. 2022: softmax)
`twinlog3` …           two-sided logarithm, dense at zero, for long tails
`tan3` …               dense near 1, for softmax (DopQ-ViT's tan companding)
`codebook2` … `8`      learned numbers, one set for each row or one for the tensor
=====================  ===========================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qcompiler.errors import unknown
from qcompiler.formats import levels
from qcompiler.formats.base import Element as Element
from qcompiler.formats.minifloat import Minifloat

MINIFLOATS = ("fp8_e4m3", "fp8_e5m2", "fp8_e3m4", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1")
EXAMPLES = ("int4", "int8", "uint8", "ternary", "binary", "fp8_e4m3", "fp4_e2m1", "nf4", "log4")


@dataclass(frozen=True)
class Integer(Element):
    """The codes are the numbers."""

    bits: int
    signed: bool

    @property
    def top(self) -> float:  # type: ignore[override]
        return float(2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1)

    @property
    def one_sided(self) -> bool:  # type: ignore[override]
        return not self.signed

    def encode(self, u: Tensor) -> Tensor:
        low = -(2 ** (self.bits - 1)) if self.signed else 0
        return u.round().clamp(low, self.top)

    def decode(self, codes: Tensor) -> Tensor:
        return codes if codes.is_floating_point() else codes.float()


@dataclass(frozen=True)
class Ternary(Integer):
    """-1, 0, 1: five in a byte, as 3⁵ = 243."""

    bits: int = 2
    signed: bool = True

    def encode(self, u: Tensor) -> Tensor:
        return u.round().clamp(-1, 1)


@dataclass(frozen=True)
class Codebook(Element):
    """Learned numbers: they lie in a table beside the codes, of which this knows only the size."""

    bits: int
    top: float = 1.0

    def encode(self, u: Tensor) -> Tensor:
        raise TypeError("a codebook's numbers are in its table")

    def decode(self, codes: Tensor) -> Tensor:
        raise TypeError("a codebook's numbers are in its table")


@dataclass(frozen=True)
class Power(Element):
    """`e8m0`: 2^(code - 127), the scales of MX formats (OCP MX v1.0, 5.4.1)."""

    bits: int = 8
    top: float = 1.0
    one_sided: bool = True

    def encode(self, u: Tensor) -> Tensor:
        # The nearest by ratio; where a format floors instead, it hands over a power of two.
        code = u.float().clamp_min(2.0**-127).log2().round().clamp(-127, 127) + 127
        return code.nan_to_num(255)

    def decode(self, codes: Tensor) -> Tensor:
        power = torch.exp2(codes.double() - 127).float()  # 2^-127 is subnormal in float32
        return power.where(codes != 255, torch.nan)


@dataclass(frozen=True)
class Half(Element):
    """The codes are the bits of a 16-bit floating point type."""

    name: str

    bits: int = 16
    signed: bool = True
    top: float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.name == "fp16" else torch.bfloat16

    def encode(self, u: Tensor) -> Tensor:
        largest = torch.finfo(self.dtype).max
        return u.clamp(-largest, largest).to(self.dtype).view(torch.int16)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.int16).view(self.dtype).float()


@lru_cache(maxsize=256)
def element(name: str) -> Element:
    """The element called `name`; an unknown one is a `BadInput` that lists what there is."""
    if match := re.fullmatch(r"(?:(u?)int([1-8])|int(16))", name):
        return Integer(int(match[2] or match[3]), not match[1])
    if match := re.fullmatch(r"fp(\d+)_e(\d)m(\d)", name):
        bits, exponent, mantissa = map(int, match.groups())
        if bits == 1 + exponent + mantissa and 2 <= bits <= 8 and exponent:
            return Minifloat(exponent, mantissa)
    if name in FIXED:
        return FIXED[name]
    if (match := re.fullmatch(r"([a-z]+)(\d)", name)) and match[1] in FAMILIES:
        make, low, high = FAMILIES[match[1]]
        if low <= int(match[2]) <= high:
            return make(int(match[2]))
    raise unknown("element type", name, EXAMPLES)


FIXED: dict[str, Element] = {
    "ternary": Ternary(),
    "binary": levels.BINARY,
    "e8m0": Power(),
    "fp16": Half("fp16"),
    "bf16": Half("bf16"),
}
FAMILIES: dict[str, tuple[Callable[[int], Element], int, int]] = {
    "nf": (levels.normal_float, 2, 4),
    "pot": (levels.power_of_two, 2, 8),
    "log": (levels.log, 1, 7),
    "twinlog": (levels.twin_log, 2, 8),
    "tan": (levels.tan, 1, 8),
    "mid": (levels.mid, 2, 4),
    "codebook": (Codebook, 1, 8),
}
"""Family → what makes it from a number of bits, the fewest and the most bits."""


def element_names() -> list[str]:
    """Every name of an element; of small floating point numbers, those that others use too."""
    integers = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 9)]
    families = [
        f"{name}{bits}"
        for name, (_, low, high) in FAMILIES.items()
        for bits in range(low, high + 1)
    ]
    return [*integers, "int16", *MINIFLOATS, *FIXED, *families]
