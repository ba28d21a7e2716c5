"""Small floating point numbers: sign, E exponent bits, M mantissa bits, with subnormals.

    u = (-1)^s 2^(e - bias) (1 + m/2^M)     or, for e = 0,     (-1)^s 2^(1 - bias) m/2^M

with bias = 2^(E-1) - 1, rounded half to even, and saturated: what is too large becomes the largest
number. All codes are numbers, as in OCP MX v1.0 (5.3), but for 8 bits: e4m3 gives its last code to
NaN (OCP FP8, `float8_e4m3fn`), all others the last exponent to infinity and NaN, as IEEE 754 does.

Numbers, codes and rounding are, bit for bit, those of torch and ml_dtypes: `fp8_e4m3` is their
`float8_e4m3fn` (not IEEE's `float8_e4m3`, which ends at 240), `fp8_e5m2` `float8_e5m2`, `fp8_e3m4`
`float8_e3m4`, `fp6_e2m3`, `fp6_e3m2` and `fp4_e2m1` those with `fn` behind. Only above the top do
they differ: torch gives e5m2 infinity, ml_dtypes NaN or infinity where there are any.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qcompiler.formats.base import Element


@dataclass(frozen=True)
class Minifloat(Element):
    """The element `fp{1+E+M}_e{E}m{M}`."""

    exponent: int
    mantissa: int

    @property
    def bits(self) -> int:  # type: ignore[override]
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return int(2 ** (self.exponent - 1)) - 1

    @property
    def last(self) -> int:
        """Code of the largest number."""
        whole: int = 2 ** (self.bits - 1) - 1
        if self.bits < 8:
            return whole
        if self.exponent == 4:
            return whole - 1
        return whole - int(2**self.mantissa)

    @property
    def top(self) -> float:  # type: ignore[override]
        return self._magnitude(self.last)

    def _magnitude(self, code: int) -> float:
        field, m = code >> self.mantissa, code & (2**self.mantissa - 1)
        if field == 0:
            return float(2.0 ** (1 - self.bias - self.mantissa) * m)
        return float(2.0 ** (field - self.bias) * (1 + m / 2**self.mantissa))

    def encode(self, u: Tensor) -> Tensor:
        size = u.abs().nan_to_num(0.0).clamp(max=self.top)
        least = 1 - self.bias
        # frexp gives a fraction in [½, 1): its exponent is one above the number's; 0 has none.
        exponent = (torch.frexp(size).exponent - 1).clamp(min=least).where(size > 0, least)
        steps = torch.round(torch.ldexp(size, self.mantissa - exponent)).to(torch.int32)
        # Steps of a normal number start at 2^M, which the exponent field 1 adds of itself: a
        # number rounded up to the next power of two, and a subnormal one, come out right so.
        code = steps + ((exponent + self.bias - 1).to(torch.int32) << self.mantissa)
        return code | (torch.signbit(u).to(torch.int32) << (self.bits - 1))

    def decode(self, codes: Tensor) -> Tensor:
        return _numbers(self).to(codes.device)[codes.long()]

    def number(self, code: int) -> float:
        """What a code without its sign stands for."""
        return self._magnitude(code) if code <= self.last else self._special(code)

    def _special(self, code: int) -> float:
        infinite = self.exponent != 4 and code == self.last + 1
        return float("inf") if infinite else float("nan")


@lru_cache(maxsize=64)
def _numbers(kind: Minifloat) -> Tensor:
    """Every number by its code, float32."""
    half = [kind.number(code) for code in range(2 ** (kind.bits - 1))]
    return torch.tensor([*half, *(-v for v in half)])
