"""Round to nearest, with scales that cover each block's range.

s = max|w| / qmax        q = clamp(round(w / s))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qcompiler.formats import Grid, QFormat, QTensor
from qcompiler.rounding.base import Layer, Rounding


def nearest(weight: Tensor, fmt: QFormat) -> QTensor:
    """`weight` (out, …) in any floating point type; arithmetic is in float32. Needs no data."""
    wide = weight.float()
    return Grid.fit(wide, fmt).quantize(wide)


@dataclass(frozen=True, kw_only=True)
class Nearest(Rounding):
    """Round to nearest; needs no data."""

    name: ClassVar[str] = "nearest"

    def layer(self, layer: Layer) -> QTensor:
        return nearest(layer.weight, layer.format)
