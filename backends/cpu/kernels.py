"""The kernels: torch's low-precision products, as operators that a graph can hold.

=============  ============================================================================
`int8`         int8 × int8 → int32, exact; activations per token (dynamic) or per tensor
`packed8`      int8 weights, bfloat16 activations, float32 sums
`packed4`      int4 weights in groups, bfloat16 activations, float32 sums
`float`        float weights made once from the integers: small on disk only, never wrong
=============  ============================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qcompiler.backend import Capability
from qcompiler.formats import Grid, QFormat, QTensor

_library = torch.library.Library("qc_cpu", "DEF")
_library.define(
    "linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? x_scale) -> Tensor"
)
_library.define("linear_packed8(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor")
_library.define(
    "linear_packed4(Tensor x, Tensor weight, Tensor scales, Tensor? bias, int group, int width)"
    " -> Tensor"
)


def linear_int8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, x_scale: Tensor | None
) -> Tensor:
    """y = (q_x q_wᵀ) s_x s_w + b with an exact integer product.

    x (…, in) floating point, weight (out, in) int8, scale (out,); x_scale is one number, or None
    for one scale per token.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    if x_scale is None:
        x_scale = rows.abs().amax(-1, keepdim=True).div_(127)
        x_scale = x_scale.masked_fill_(x_scale == 0, 1.0)
    q = (rows / x_scale).round_().clamp_(-127, 127).to(torch.int8)
    y = torch._int_mm(q, weight.t()).float().mul_(x_scale).mul_(scale)
    return _finish(y, x, bias)


def linear_packed8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y = (x q_wᵀ) s_w + b with x rounded to bfloat16; weight (out, in) int8, scale (out,)."""
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    # The scale is applied behind the product: inside, it would be rounded to bfloat16.
    one = torch.ones(weight.shape[0], dtype=torch.bfloat16)
    y = torch._weight_int8pack_mm(rows, weight, one).float().mul_(scale)
    return _finish(y, x, bias)


def linear_packed4(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group: int, width: int
) -> Tensor:
    """y = x Wᵀ + b with W = (q - 8) s per group; x and s are rounded to bfloat16.

    `weight` is torch's packing for this CPU, `scales` (in / group, out, 2) bfloat16, `width` = out.
    """
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    scales = scales.to(torch.bfloat16)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight, group, scales).float()
    return _finish(y, x, bias)


def _finish(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        y = y.add_(bias)
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def _linear_int8_shape(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, x_scale: Tensor | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_packed8_shape(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_packed4_shape(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group: int, width: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], width))


for _name, _run, _shape in (
    ("linear_int8", linear_int8, _linear_int8_shape),
    ("linear_packed8", linear_packed8, _linear_packed8_shape),
    ("linear_packed4", linear_packed4, _linear_packed4_shape),
):
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"qc_cpu::{_name}", _shape, lib=_library)


Prepared = dict[str, Tensor]
"""Parameters of a kernel call by argument name, in the order of the operator's arguments."""


@dataclass(frozen=True)
class Kernel:
    """One kernel: what it serves, how a weight is prepared for it, how it is called."""

    name: str
    capability: Capability
    prepare: Callable[[QTensor], Prepared]
    call: Callable[[Tensor, Prepared, Tensor | None, QFormat | None, Tensor | None], Tensor]
    """(x, prepared weight, bias, activation format, static activation scale) → y"""
    shape: Callable[[int, int, QFormat], str | None] = lambda out, width, fmt: None
    """(out, in, weight format) → why the kernel cannot take it, or None."""


def _prepare8(q: QTensor) -> Prepared:
    return {"weight": q.data.to(torch.int8).contiguous(), "scale": q.scale.reshape(-1).float()}


def _prepare4(q: QTensor) -> Prepared:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((q.data.int() + 8), 1)
    scale = q.scale.t().to(torch.bfloat16)
    return {"weight": packed, "scales": torch.stack([scale, torch.zeros_like(scale)], -1)}


def _prepare_float(q: QTensor) -> Prepared:
    return {"weight": q.dequantize()}


def _call_float(
    x: Tensor, w: Prepared, bias: Tensor | None, fmt: QFormat | None, x_scale: Tensor | None
) -> Tensor:
    if fmt is not None:
        x = torch.ops.qc.fake_quantize(x, str(fmt), x_scale, None)
    return torch.nn.functional.linear(x, w["weight"], bias)


def _shape4(out: int, width: int, fmt: QFormat) -> str | None:
    group = fmt.block[0] if fmt.block else 0
    if group not in (32, 64, 128) or width % group or out % 16:
        return f"takes groups of 32, 64 or 128 that divide {width}, and rows in 16s; found {out}"
    return None


def _table(kernels: list[Kernel]) -> dict[str, Kernel]:
    return {k.name: k for k in kernels}


def _shape8(out: int, width: int, fmt: QFormat) -> str | None:
    # torch's kernel reads 16 inputs at a time and does not look where the row ends.
    return None if width % 16 == 0 else f"takes inputs in 16s; found {width}"


# `[!ld]` leaves out what ends in `full` or `mirrored`: the kernel's own scales are for ±127.
KERNELS = _table(
    [
        Kernel(
            "int8",
            Capability(
                "int8",
                "linear",
                "int8:channel",
                "int8:t*[!ld]",
                5e-3,
                "exact integer product",
                decoded=True,
            ),
            _prepare8,
            lambda x, w, b, fmt, s: torch.ops.qc_cpu.linear_int8(x, w["weight"], w["scale"], b, s),
        ),
        Kernel(
            "packed8",
            Capability(
                "packed8",
                "linear",
                "int8:channel",
                "float",
                2e-2,
                "bfloat16 activations",
                decoded=True,
            ),
            _prepare8,
            lambda x, w, b, fmt, s: torch.ops.qc_cpu.linear_packed8(x, w["weight"], w["scale"], b),
            _shape8,
        ),
        Kernel(
            "packed4",
            Capability(
                "packed4",
                "linear",
                "int4:group*",
                "float",
                3e-2,
                "bfloat16 activations",
                decoded=True,
            ),
            _prepare4,
            lambda x, w, b, fmt, s: torch.ops.qc_cpu.linear_packed4(
                x,
                w["weight"],
                w["scales"],
                b,
                x.shape[-1] // w["scales"].shape[0],
                w["scales"].shape[1],
            ),
            _shape4,
        ),
        Kernel(
            "float",
            Capability("float", "linear", "*", "*", 1e-3, "float weights in memory"),
            _prepare_float,
            _call_float,
        ),
        Kernel(
            "gather",
            Capability(
                "gather", "embedding", "*", "float", 1e-6, "decodes only the rows that are read"
            ),
            _prepare_float,
            _call_float,
        ),
    ]
)


@lru_cache(maxsize=len(KERNELS))
def self_test(name: str) -> str | None:
    """Prove a kernel on this CPU with weights and activations at ±127; None, or what is wrong.

    This is where sums of 16 bits overflow: 255 · 127 · 2 needs 17.
    """
    kernel = KERNELS[name]
    if name in ("float", "gather"):
        return None
    four = name == "packed4"
    fmt = QFormat("int4" if four else "int8", (32,) if four else (-1,))
    exact = name == "int8"
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 17):
        sign = torch.randint(0, 2, (64, 512), generator=generator) * 2 - 1
        for weight in (torch.ones(64, 512, dtype=torch.int16), sign.to(torch.int16)):
            data = weight * fmt.qmax
            scale = torch.full(fmt.scale_shape((64, 512)), 0.5)
            q = QTensor(data, Grid(fmt, scale))
            x = torch.ones(rows, 512) if exact else torch.rand(rows, 512, generator=generator)
            activation = QFormat("int8", (-1,), dynamic=True) if exact else None
            try:
                y = kernel.call(x, kernel.prepare(q), None, activation, None)
            except RuntimeError as error:  # torch built without this kernel
                return f"torch {torch.__version__} cannot run it here: {str(error).splitlines()[0]}"
            want = x.double() @ q.dequantize(torch.float64).t()
            off = float((y.double() - want).norm() / want.norm())
            if not off <= (1e-5 if exact else 1e-2):
                return (
                    f"on this CPU its sums are off by {off:.1%} with weights at ±{fmt.qmax} "
                    "(16-bit partial sums saturate without VNNI)"
                )
    return None
