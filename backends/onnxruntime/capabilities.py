"""Which kernel serves which formats: the table, and the choice that everything else reads."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from qcompiler.backend import Capability
from qcompiler.backends.onnxruntime.layout import block_of
from qcompiler.formats import Scheme
from qcompiler.sites import Site

INTEGER = "MatMulInteger"
QDQ = "MatMulIntegerToFloat"
NBITS = "MatMulNBits"
TWO_NBITS = "2 MatMulNBits"
DEQUANTIZED = "float MatMul"
CONV_QDQ = "QLinearConv"
CONV = "float Conv"
GATHER = "Gather"

FLOAT32 = 1e-5
"""Tolerance where the same numbers are summed in float32 in another order, or as integers."""

REQUANTIZED = 1e-2
"""Tolerance where the kernel rounds its own output, so that a last bit may become a step."""

_REQUANTIZED = f"where a static format reads the output, maybe behind a Relu; else {CONV}"
_ROUNDED = "float arithmetic; a quantized activation is rounded and goes on in float"
_OPENED = "weights are dequantized when the file is opened"

_KERNELS = (
    Capability(INTEGER, "linear", "*int[5-8]:[ct]*", "int?:token:dynamic", FLOAT32),
    Capability(INTEGER, "linear", "*int[5-8]:[ct]*", "int?:tensor:dynamic", FLOAT32),
    Capability(QDQ, "linear", "*int[5-8]:[ct]*", "*int?:tensor", FLOAT32),
    Capability(QDQ, "linear", "*int[5-8]:[ct]*", "*int?:tensor:asym", FLOAT32),
    Capability(NBITS, "linear", "*int[2-4]:*", "*", FLOAT32, _ROUNDED),
    Capability(TWO_NBITS, "linear", "*int[5-8]:*", "*", FLOAT32, f"two 4 bit planes; {_ROUNDED}"),
    Capability(
        DEQUANTIZED,
        "linear",
        "*int[2-8]:*",
        "*",
        FLOAT32,
        f"for groups that are no multiple of 16; {_OPENED}; {_ROUNDED}",
    ),
    Capability(CONV_QDQ, "conv", "*int[5-8]:*", "*int?:tensor", REQUANTIZED, _REQUANTIZED),
    Capability(CONV_QDQ, "conv", "*int[5-8]:*", "*int?:tensor:asym", REQUANTIZED, _REQUANTIZED),
    Capability(CONV, "conv", "*int[2-8]:*", "*", FLOAT32, f"{_OPENED}; {_ROUNDED}"),
    Capability(GATHER, "embedding", "*int[2-8]:*", "*", FLOAT32, "only the rows that are read"),
)
CAPABILITIES = tuple(replace(kernel, decoded=True) for kernel in _KERNELS)


def kernel_of(
    site: Site, scheme: Scheme, among: Collection[str] | None = None
) -> Capability | None:
    """The first kernel in the table (or of those `among` it) that fits the formats and can express
    the blocks."""
    for capability in CAPABILITIES:
        if (
            (among is None or capability.kernel in among)
            and capability.fits(site, scheme)
            and (capability.kernel not in (NBITS, TWO_NBITS) or _blocks_fit(site, scheme))
        ):
            return capability
    return None


def _blocks_fit(site: Site, scheme: Scheme) -> bool:
    return scheme.weight is not None and (
        block_of(scheme.weight, int(site.weight.meta["val"].shape[-1])) is not None
    )
