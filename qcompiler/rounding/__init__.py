"""How the numbers of a quantized weight are found: one file for each method."""

from qcompiler.rounding.base import Block, Inputs, Layer, Rounding, gram_of, output_error
from qcompiler.rounding.nearest import Nearest, nearest

__all__ = [
    "Block",
    "Inputs",
    "Layer",
    "Nearest",
    "Rounding",
    "gram_of",
    "nearest",
    "output_error",
]
