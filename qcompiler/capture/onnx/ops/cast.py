"""Casts between all types of ONNX, with its rules for what does not fit."""

from __future__ import annotations

from itertools import pairwise

import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.capture.onnx.call import Call
from qcompiler.capture.onnx.table import op
from qcompiler.capture.onnx.types import TORCH, torch_dtype

D = ir.DataType
WIDTH = {D.INT4: 4, D.UINT4: 4, D.INT2: 2, D.UINT2: 2}
FLOAT8 = (D.FLOAT8E4M3FN, D.FLOAT8E4M3FNUZ, D.FLOAT8E5M2, D.FLOAT8E5M2FNUZ)
FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of float4e2m1."""


@op("Cast")
def cast(call: Call, x: Tensor) -> Tensor:
    type = D(call.int("to"))
    if type not in TORCH:
        raise call.refusal(f"casts to {type.name}; expected a type that tensors of torch can have")
    return cast_to(x, type, bool(call.int("saturate", 1)), call.text("round_mode", "up"))


@op("CastLike")
def cast_like(call: Call, x: Tensor) -> Tensor:
    return cast_to(x, call.type(1), bool(call.int("saturate", 1)), call.text("round_mode", "up"))


def cast_to(x: Tensor, type: ir.DataType, saturate: bool = True, round_mode: str = "up") -> Tensor:
    """`x` in the type `type`; types that torch lacks are held in a larger one."""
    if x.dtype.itemsize == 1 and x.is_floating_point():
        x = x.float()
    if type in WIDTH:
        return _narrow_integer(x, type)
    if type is D.FLOAT4E2M1:
        return _float4(x)
    if type is D.FLOAT8E8M0:
        return _float8_e8m0(x, saturate, round_mode)
    dtype = torch_dtype(type)
    if type in FLOAT8:
        return _float8(x.float(), dtype, saturate)
    if dtype == torch.bool:
        return x != 0
    if x.is_floating_point() and not dtype.is_floating_point and dtype != torch.int64:
        x = x.to(torch.int64)  # by way of the widest, so that what does not fit wraps around
    return x.to(dtype)


def _narrow_integer(x: Tensor, type: ir.DataType) -> Tensor:
    """The low bits, sign extended for signed types."""
    bits = WIDTH[type]
    whole = x.to(torch.int32) if x.is_floating_point() or x.dtype != torch.int32 else x
    low = torch.bitwise_and(whole, 2**bits - 1)
    if type in (D.INT4, D.INT2):
        low = torch.where(low >= 2 ** (bits - 1), low - 2**bits, low)
    return low.to(torch_dtype(type))


def _float4(x: Tensor) -> Tensor:
    """The nearest of ±{0, ½, 1, 1½, 2, 3, 4, 6}; ties go to the even code, NaN becomes 0."""
    wide = x.float()
    magnitude = wide.abs()
    result = torch.zeros_like(magnitude)
    for code, (low, high) in enumerate(pairwise(FLOAT4)):
        middle = (low + high) / 2
        above = magnitude > middle if code % 2 == 0 else magnitude >= middle
        result = torch.where(above, high, result)
    return torch.copysign(result, wide)


def _float8(x: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
    """Beyond the range: the largest number, or infinity and NaN as the type has them."""
    largest = torch.finfo(dtype).max
    if saturate:
        return torch.clamp(x, -largest, largest).to(dtype)
    has_infinity = dtype == torch.float8_e5m2
    step = 2**-3 if has_infinity else 2**-4
    over = largest * (1 + step)
    beyond = torch.inf if has_infinity else torch.nan
    inside = torch.clamp(x, -largest, largest).to(dtype).float()
    outside = torch.copysign(torch.full_like(x, beyond), x)
    return torch.where(x.abs() >= over, outside, inside).to(dtype)


def _float8_e8m0(x: Tensor, saturate: bool, round_mode: str) -> Tensor:
    """Powers of two from 2^-127 to 2^127, rounded as `round_mode` says; the sign is dropped."""
    wide = x.float().abs().to(torch.float64)
    fraction, exponent = torch.frexp(wide)  # wide = fraction · 2^exponent, ½ ≤ fraction < 1
    power = (exponent - 1).to(torch.float64)
    if round_mode == "up":
        power = power + (fraction > 0.5)
    elif round_mode == "nearest":
        power = power + (fraction >= 0.75)
    power = power.clamp(-127, 127) if saturate else power
    bits = (power + 127).clamp(0, 255)
    bits = torch.where(wide == 0, 0.0, bits)
    bits = torch.where(torch.isnan(wide), 255.0, bits)
    if not saturate:
        bits = torch.where(power > 127, 255.0, bits)
    else:
        bits = torch.where(torch.isinf(wide), 254.0, bits)
    return bits.to(torch.uint8).view(torch.float8_e8m0fnu)
