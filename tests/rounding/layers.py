"""Small layers with correlated inputs, and the formats that every rounding takes."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompiler import QFormat
from qcompiler.observers import Gram, Range, Sample
from qcompiler.rounding import Inputs, Layer

FORMATS = (
    "int4:channel", "int4:group32", "int4:group32:asym", "int3:group20:full", "uint2:group32:asym",
    "int8:channel", "int4:tensor", "int4:block8x20", "ternary:group32", "binary:group32",
    "mid2:channel", "fp4_e2m1:group32", "fp8_e4m3:channel", "mxfp4", "nvfp4", "mxint8",
    "nf4:group32", "pot4:channel", "int4:group16:scale(fp16)", "int3:group16:scale(uint3:group4)",
    "int4:group16:asym:scale(fp8_e4m3:tensor)", "fp16", "fp6_e2m3:group32:scale(e8m0)",
)  # fmt: skip
"""Groups of 32 leave a short last one in 80 columns."""
CODEBOOKS = ("codebook3:channel", "codebook4:tensor")


def layer(
    fmt: str, out: int = 24, width: int = 80, vectors: int = 400, seed: int = 0, dead: int = 0
) -> Layer:
    """A layer whose inputs vary mostly along a few directions, some columns far more than others.

    Its first `dead` inputs are always zero.
    """
    draw = torch.Generator().manual_seed(seed)
    few = torch.randn(vectors, width // 8 + 1, generator=draw)
    rows = few @ torch.randn(few.shape[1], width, generator=draw)
    rows += torch.randn(vectors, width, generator=draw)
    rows *= torch.randn(width, generator=draw).exp()
    rows[:, :dead] = 0
    weight = torch.randn(out, width, generator=draw)
    seen = Inputs(Range.of(rows), Gram.of(rows), Sample.of(rows).rows)
    return Layer("layer", weight, QFormat.parse(fmt), seen)


def gram(of: Layer) -> Tensor:
    assert of.inputs.gram is not None
    return of.inputs.gram.matrix


def sample(of: Layer) -> Tensor:
    assert of.inputs.sample is not None
    return of.inputs.sample
