"""What every element is: a finite set of numbers with codes and a rule of rounding."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Element(ABC):
    """A set of numbers, by code."""

    bits: int
    """Bits of a code."""
    signed: bool = False
    """Codes are two's complement."""
    top: float
    one_sided: bool = False
    """No negative numbers."""

    @abstractmethod
    def encode(self, u: Tensor) -> Tensor:
        """Codes (any integer or floating point type) of numbers in units of the scale."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Numbers (float32, or the type of floating point codes), same shape."""

    def values(self) -> Tensor:
        """Every number, by the bits of its code (a NaN where they stand for none), float32."""
        codes = torch.arange(2**self.bits, dtype=torch.int32)
        return self.decode(codes - (codes >> (self.bits - 1) << self.bits) * self.signed)
