"""torch's own low-precision products, as operators that a graph can hold.

=================  =========================================================================
`linear_int8`      int8 × int8 → int32, exact; activations per token (dynamic) or per tensor
`linear_packed8`   int8 weights, bfloat16 activations, float32 sums
`linear_packed4`   int4 weights in groups, bfloat16 activations, float32 sums
=================  =========================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("qc_cpu", "FRAGMENT")
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
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
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
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
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
