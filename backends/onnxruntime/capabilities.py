"""Which kernels serve which formats: the table, in the order in which they are taken where none is
timed, and the choice that everything else reads."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from importlib.util import find_spec

from qcompiler.backend import Capability
from qcompiler.backends.onnxruntime.layout import block_of
from qcompiler.export.weights import container
from qcompiler.formats import Scheme
from qcompiler.sites import Site

INTEGER = "MatMulInteger"
QDQ = "MatMulIntegerToFloat"
NBITS = "MatMulNBits"
TWO_NBITS = "2 MatMulNBits"
NBITS_INT8 = "MatMulNBits int8"
DEQUANTIZED = "float MatMul"
CONV_QDQ = "QLinearConv"
CONV = "float Conv"
GATHER = "Gather"

FLOAT32 = 1e-5
"""Tolerance where the same numbers are summed in float32 in another order, or as integers."""

OFFSET = 1e-4
"""Tolerance of a kernel that was off by up to 3.5e-5, most with codes of five bits in containers of
eight: as if a zero point were taken off behind the sums, in float32, where these are hundreds of
times what is left."""

REQUANTIZED = 1e-2
"""Tolerance where the kernel rounds its own output, so that a last bit may become a step."""

_REQUANTIZED = f"where a static format reads the output, behind Relu or MaxPool too; else {CONV}"
_ROUNDED = "float arithmetic; a quantized activation is rounded and goes on in float"
_WIDENED = "4 bits and fewer become 8 when the file is opened"
_BLOCKS = "activations in groups of 16, 32, 64, 128 or 256, of which those of weights are multiples"
_OPENED = "weights are dequantized when the file is opened"

_KERNELS = (
    Capability(INTEGER, "linear", "*int[2-8]:[ct]*", "int?:token:dynamic", FLOAT32, _WIDENED),
    Capability(INTEGER, "linear", "*int[2-8]:[ct]*", "int?:tensor:dynamic", FLOAT32, _WIDENED),
    Capability(QDQ, "linear", "*int[2-8]:[ct]*", "*int?:tensor", FLOAT32, _WIDENED),
    Capability(QDQ, "linear", "*int[2-8]:[ct]*", "*int?:tensor:asym", FLOAT32, _WIDENED),
    Capability(NBITS_INT8, "linear", "*int[2-8]:*", "int8:group*:dynamic", OFFSET, _BLOCKS),
    Capability(NBITS, "linear", "*int[2-4]:*", "*", FLOAT32, _ROUNDED),
    Capability(TWO_NBITS, "linear", "*int[5-8]:*", "*", FLOAT32, f"two 4 bit planes; {_ROUNDED}"),
    Capability(
        DEQUANTIZED,
        "linear",
        "*int[2-8]:*",
        "*",
        FLOAT32,
        f"where nothing else fits, or all else is much slower; {_OPENED}; {_ROUNDED}",
    ),
    Capability(CONV_QDQ, "conv", "*int[5-8]:*", "*int?:tensor", REQUANTIZED, _REQUANTIZED),
    Capability(CONV_QDQ, "conv", "*int[5-8]:*", "*int?:tensor:asym", REQUANTIZED, _REQUANTIZED),
    Capability(CONV, "conv", "*int[2-8]:*", "*", FLOAT32, f"{_OPENED}; {_ROUNDED}"),
    Capability(GATHER, "embedding", "*int[2-8]:*", "*", FLOAT32, "only the rows that are read"),
)
CAPABILITIES = tuple(replace(kernel, decoded=True) for kernel in _KERNELS)


def kernels_of(
    site: Site, scheme: Scheme, among: Collection[str] | None = None
) -> list[Capability]:
    """The kernels in the table (or of those `among` it) that fit the formats and can express the
    blocks."""
    return [
        capability
        for capability in CAPABILITIES
        if (among is None or capability.kernel in among)
        and capability.fits(site, scheme)
        and _blocks_fit(capability.kernel, site, scheme)
    ]


def _blocks_fit(kernel: str, site: Site, scheme: Scheme) -> bool:
    """Whether `MatMulNBits` reads blocks of such sizes, and rounds its input as it is asked to."""
    if kernel not in (NBITS, TWO_NBITS, NBITS_INT8):
        return True
    assert scheme.weight is not None  # their patterns say so
    width = int(site.weight.meta["val"].shape[-1])
    if kernel != NBITS_INT8:
        return block_of(scheme.weight, width) is not None
    block = block_of(scheme.weight, width, scheme.activation)
    return block is not None and find_spec("onnxruntime") is not None and _rounds(scheme, block)


def _rounds(scheme: Scheme, block: int) -> bool:
    from qcompiler.backends.onnxruntime.probe import rounds_input

    assert scheme.weight is not None
    return rounds_input(container(scheme.weight.bits), block)
