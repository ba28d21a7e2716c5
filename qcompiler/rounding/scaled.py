"""Roundings that find scales and codes for the output's error: what they refuse, and start from."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qcompiler.errors import BadInput
from qcompiler.formats import QFormat, QTensor
from qcompiler.rounding.base import Layer, Need, Rounding, gram_of
from qcompiler.rounding.gptq import Factor, definite
from qcompiler.rounding.nearest import nearest


@dataclass(frozen=True, kw_only=True)
class Scaled(Rounding):
    """One that needs scales to find, and a Gram matrix with a factor."""

    needs: ClassVar[tuple[Need, ...]] = ("gram",)
    instead: ClassVar[str]
    """What serves formats without scales."""

    damping: float = 0.01
    """λ in units of the mean diagonal of H, as in `gptq`."""

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise BadInput(f"{self.name}: damping is 0 or more, found {self.damping}")

    def layer(self, layer: Layer) -> QTensor:
        fmt, weight = layer.format, layer.weight.float()
        if fmt.is_codebook or fmt.unscaled:
            raise BadInput(
                f"{self.name} finds scales, and {fmt} of {layer.id} has none; use {self.instead}"
            )
        gram, found = gram_of(layer), definite(layer, self.damping)
        return nearest(weight, fmt) if found is None else self.solve(weight, fmt, gram, found)

    @abstractmethod
    def solve(self, weight: Tensor, fmt: QFormat, gram: Tensor, found: Factor) -> QTensor:
        """`weight` (out, in) rounded; `found` is the triangle of H + λ I, `gram` is H."""
