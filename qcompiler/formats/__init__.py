"""How a tensor is stored at low precision: formats, schemes, and quantized tensors.

A `QFormat` is data. It says which numbers exist and which elements share a scale, never how the
scale was found (that is a rounding's business) nor which kernel reads it (a backend's).
"""

from qcompiler.formats.element import Element, element, element_names
from qcompiler.formats.format import ALIASES, NAMED_BLOCKS, QFormat, Scheme
from qcompiler.formats.grid import Grid, QTensor, block_range, dequantize, encode, spread
from qcompiler.formats.packing import pack, unpack

__all__ = [
    "ALIASES",
    "NAMED_BLOCKS",
    "Element",
    "Grid",
    "QFormat",
    "QTensor",
    "Scheme",
    "block_range",
    "dequantize",
    "element",
    "element_names",
    "encode",
    "pack",
    "spread",
    "unpack",
]
