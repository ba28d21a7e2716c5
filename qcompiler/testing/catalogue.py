"""Formats that claims are tried with: what a pattern of a capability is taken to mean.

A claim of kernels for many formats is tried with each that is listed here and matches, weights and
activations in pairs, so that each of both comes up at least once.
"""

from __future__ import annotations

from qcompiler.backend import Capability
from qcompiler.errors import BadInput, unknown
from qcompiler.formats import QFormat, Scheme
from qcompiler.schemes import FLOAT, fit
from qcompiler.sites import KINDS, Site

WEIGHTS = (
    "int8:channel", "int4:group32", "int8:tensor", "int8:channel:asym", "int8:channel:full",
    "int8:channel:mirrored", "int8:channel:scale(fp16)", "int8:channel:planes", "int8:group24",
    "int8:group32", "int8:group128:asym", "uint8:channel:asym", "int7:channel", "int6:group32:asym",
    "int5:channel", "int5:group16", "int4:channel", "int4:channel:asym", "int4:group16",
    "int4:group24", "int4:group64", "int4:group128", "int4:group32:asym", "int4:group32:full",
    "int4:group32:mirrored", "int4:group32:scale(fp16)", "int4:group128:asym:scale(fp16)",
    "int4:group32:planes", "uint4:group32:asym", "int3:channel", "int3:group32",
    "int3:group32:planes", "int2:channel:asym", "int2:group32", "int2:group32:planes",
    "int1:channel:asym", "ternary:channel", "binary:channel", "nf4:group64", "codebook4:channel",
    "pot4:channel", "fp8_e4m3:channel", "fp8_e5m2:tensor", "mxfp4", "mxfp6_e2m3", "mxfp8_e4m3",
    "mxint8", "nvfp4", "bf16", "fp16", FLOAT,
)  # fmt: skip
ACTIVATIONS = (
    FLOAT, "int8:token:dynamic", "int8:tensor", "int8:tensor:asym", "uint8:tensor:asym",
    "uint8:tensor", "int8:tensor:dynamic", "int8:token:asym:dynamic", "int8:token:dynamic:full",
    "int8:tensor:full", "int8:token:dynamic:clip0.9", "int8:group32:dynamic", "int6:token:dynamic",
    "int4:token:dynamic", "fp8_e4m3:token:dynamic", "fp8_e4m3:tensor", "mxfp8_e4m3:dynamic",
    "mxfp4:dynamic",
)  # fmt: skip


def schemes(capability: Capability, site: Site) -> list[Scheme]:
    """Schemes in the shape of `site` that the claim's patterns match."""
    weights = {str(s.weight): s for w in WEIGHTS if (s := _fit(site, w, FLOAT)) is not None}
    inputs = {str(s.activation): s for a in ACTIVATIONS if (s := _fit(site, FLOAT, a)) is not None}
    pairs = {
        (w, a): scheme
        for w, weight in weights.items()
        for a, other in inputs.items()
        if (scheme := Scheme(weight.weight, other.activation)) != Scheme()
        and capability.fits(site, scheme)
    }
    first, second = (list(dict.fromkeys(pair[i] for pair in pairs)) for i in (0, 1))
    count = max(len(first), len(second))
    chosen = [(first[i % len(first)], second[i % len(second)]) for i in range(count)]
    return [pairs[pair] for pair in chosen if pair in pairs]


def misspelt(capability: Capability) -> str:
    """Why no format of the catalogue matches the claim's patterns, or no shape its operator."""
    operators = {kind.name for kind in KINDS.values()}
    if capability.op not in operators:
        return str(unknown("operator", capability.op, operators))
    try:
        for pattern in (capability.weight, capability.activation):
            if pattern != FLOAT and not set(pattern) & set("*?["):
                QFormat.parse(pattern)
    except BadInput as error:
        return str(error)
    return "no format matches its patterns"


def _fit(site: Site, weight: str, activation: str) -> Scheme | None:
    """The scheme in the shape of `site`, None if it cannot be there."""
    try:
        return fit(site, weight, activation)
    except BadInput:
        return None
