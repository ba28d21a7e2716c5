"""The table of kernels: what each serves, how a weight is prepared for it, what it computes.

=========  ======================================================================================
`w8a8`     int8 × int8 → int32, exact; activations per token (dynamic) or per tensor
`fp8`      e4m3 × e4m3 → float32, likewise; from Ada and Hopper on
`w4a8`     4-bit integers made int8 in registers, int32 sums for each group
`w4a16`    4-bit integers, e2m1 (MXFP4, NVFP4); 16-bit activations, rounded by torch if they are
`w8a16`    int8 and e4m3 weights; the same activations
`float`    numbers made once from the codes: small on disk only, never wrong
`gather`   embeddings: decodes only the rows that are read
=========  ======================================================================================

This module needs no triton; the operators are found when one is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qcompiler.backend import Capability
from qcompiler.backends.triton.runtime import has
from qcompiler.backends.triton.weights import Weight, group_of, plain_octets, units
from qcompiler.formats import QTensor

Call = Callable[..., Any]
"""Calls an operator, or puts a node that does into a graph: (operator, arguments…)."""
Rounding = Callable[[bool], Any]
"""Makes (codes, scales) of the input; True for e4m3, False for int8."""
Tensors = Mapping[str, Any]
"""Those of a weight, or the nodes of them."""
Compute = Callable[[Call, Any, Rounding, Tensors, Weight, Any, torch.dtype], Any]
"""(call, input, rounded input, tensors of the weight, weight, bias, type of the output) → output"""


@dataclass(frozen=True)
class Kernel:
    """One kernel."""

    name: str
    capabilities: tuple[Capability, ...]
    prepare: Callable[[QTensor], Weight]
    compute: Compute
    unfit: Callable[[QTensor], str | None] = lambda q: None
    """Why it cannot take a weight of a format that it is made for, or None."""
    rounds: bool = False
    """Whether it rounds activations itself."""

    def missing(self) -> str | None:
        """Why it cannot run on this GPU, or None."""
        lacks = [f for f in self.capabilities[0].needs if not has(f)]
        return f"needs {', '.join(lacks)}, which this GPU lacks" if lacks else None


def _multiple(lanes: int) -> Callable[[QTensor], str | None]:
    def unfit(q: QTensor) -> str | None:
        group = group_of(q)
        if group is None or group % lanes:
            return f"takes rows, or groups in {lanes}s, with one scale; found {q.format}"
        return None

    return unfit


def _whole_zeros(q: QTensor) -> str | None:
    zero = torch.zeros(1) if q.zero is None else q.zero.float()
    least = -8 if q.format.signed else 0
    if not torch.equal(zero, zero.round()) or zero.min() < least or zero.max() > 64:
        return f"takes whole zero points from {least} to 64; found others"
    return _multiple(32)(q)


def _symmetric(q: QTensor) -> str | None:
    return (
        None if q.zero is None and group_of(q) == 0 else f"takes no zero points; found {q.format}"
    )


def _scaled(fp8: bool) -> Compute:
    def compute(
        call: Call,
        x: Any,
        rounded: Rounding,
        w: Tensors,
        weight: Weight,
        bias: Any,
        dtype: torch.dtype,
    ) -> Any:
        codes, scales = rounded(fp8)
        target = torch.ops.qc_triton.linear_scaled.default
        return call(target, codes, scales, w["weight"], w["scale"], bias, weight.rows, dtype)

    return compute


def _w4a8(
    call: Call, x: Any, rounded: Rounding, w: Tensors, weight: Weight, bias: Any, dtype: torch.dtype
) -> Any:
    codes, scales = rounded(False)
    return _decoded(call, codes, scales, w, weight, bias, dtype)


def _short(
    call: Call, x: Any, rounded: Rounding, w: Tensors, weight: Weight, bias: Any, dtype: torch.dtype
) -> Any:
    return _decoded(call, x, None, w, weight, bias, dtype)


def _decoded(
    call: Call, x: Any, x_scale: Any, w: Tensors, weight: Weight, bias: Any, dtype: torch.dtype
) -> Any:
    sides = (w["units"], w["scale"], w.get("zero"), bias, weight.group, weight.rows, weight.kind)
    return call(torch.ops.qc_triton.linear_decoded.default, x, x_scale, *sides, dtype)


def _float(
    call: Call, x: Any, rounded: Rounding, w: Tensors, weight: Weight, bias: Any, dtype: torch.dtype
) -> Any:
    return call(torch.ops.aten.linear.default, x, w["weight"], bias)


def _claims(
    kernel: str, weights: str, activations: str, tolerance: float, sums: str, note: str = "",
    needs: tuple[str, ...] = ("sm_80",), library: bool = False,
) -> tuple[Capability, ...]:  # fmt: skip
    """One capability for each pair of formats."""
    return tuple(
        Capability(
            kernel,
            "linear",
            w,
            a,
            tolerance,
            note,
            decoded=not library,
            accumulator=sums,
            needs=needs,
            splits_sums=library,
        )
        for w in weights.split()
        for a in activations.split()
    )


INT8 = "int8:token:dynamic int8:tensor"
E4M3 = "fp8_e4m3:token:dynamic fp8_e4m3:tensor"
INTEGERS = "int[234]:* uint[234]:*"
BYTES = "int8:* uint8:* fp8_e4m3:*"
KERNELS = {
    k.name: k
    for k in (
        Kernel(
            "w8a8",
            _claims("w8a8", "int8:[ct]*", INT8, 5e-3, "int32"),
            plain_octets,
            _scaled(False),
            _symmetric,
            rounds=True,
        ),
        Kernel(
            "fp8",
            _claims("fp8", "fp8_e4m3:[ct]*", E4M3, 1e-2, "float32", needs=("sm_89",)),
            plain_octets,
            _scaled(True),
            _symmetric,
            rounds=True,
        ),
        Kernel(
            "w4a8",
            _claims("w4a8", INTEGERS, INT8, 5e-3, "int32 in each group"),
            lambda q: units(q, 8),
            _w4a8,
            _whole_zeros,
            rounds=True,
        ),
        Kernel(
            "w4a16",
            _claims("w4a16", f"{INTEGERS} fp4_e2m1:*", "*", 1e-2, "float32", "16-bit activations"),
            lambda q: units(q, 16),
            _short,
            _multiple(16),
        ),
        Kernel(
            "w8a16",
            _claims("w8a16", BYTES, "*", 1e-2, "float32", "16-bit activations"),
            lambda q: units(q, 16),
            _short,
            _multiple(16),
        ),
        Kernel(
            "float",
            _claims("float", "*", "*", 1e-3, "", "float weights in memory", (), library=True),
            lambda q: Weight({"weight": q.dequantize()}, int(q.data.shape[0])),
            _float,
        ),
    )
}
GATHER = Capability(
    "gather", "embedding", "*", "float", 1e-6, "decodes only the rows that are read"
)
