"""Activations rounded per token, to int8 or e4m3 codes: s = max|x| / top, q = round(x / s).

Codes are bit for bit those of the reference. Rows are padded with zeros to whole tiles of the
product that reads them. `hadamard.py` does the same behind a Hadamard transform.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.backends.triton.layout import INNER, padded
from qcompiler.backends.triton.operators import operator, rows_of

ROUND = tl.constexpr(12582912.0)
"""1.5 · 2^23: added and taken away again, it rounds to integers, half to even."""
SMALLEST = tl.constexpr(1.1754943508222875e-38)
"""Where scales stop: float32's smallest normal number."""


@triton.jit
def _e4m3(u):
    """Bits of the nearest number of e4m3, half to even, by integer arithmetic: a conversion that
    every GPU has, and that the interpreter gets right too."""
    size = tl.minimum(tl.abs(u), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = ((size * 512.0 + ROUND) - ROUND).to(tl.int32)  # below 2^-6 steps are 2^-9
    sign = (u.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(size < 0.015625, small, normal) | sign).to(tl.uint8)


@triton.jit
def encode(y, s, FP8: tl.constexpr):
    """Codes of y in units of s."""
    u = tl.div_rn(y, s)
    if FP8:
        return _e4m3(u)
    else:
        return tl.clamp((u + ROUND) - ROUND, -127.0, 127.0).to(tl.int8)


@triton.jit
def scale_of(largest, given, FP8: tl.constexpr):
    """The scale that is given, else the one that lets the largest magnitude have the top code."""
    if given is not None:
        return largest * 0 + tl.load(given).to(tl.float32)
    s = tl.div_rn(largest, largest * 0 + (448.0 if FP8 else 127.0))
    return tl.where(largest == 0, 1.0, tl.maximum(s, SMALLEST))


@triton.jit
def _round(x, given, codes, scales, width, inner, FP8: tl.constexpr, BLOCK: tl.constexpr):
    """One row for each program."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    y = tl.load(x + row * width + k, mask=k < width, other=0.0).to(tl.float32)
    s = scale_of(tl.max(tl.abs(y), 0), given, FP8)
    tl.store(codes + row * inner + k, encode(y, s, FP8), mask=k < inner)
    tl.store(scales + row, s)


def _shape(x: Tensor, given: Tensor | None, fp8: bool) -> tuple[Tensor, Tensor]:
    return buffers(x, fp8)


@operator(_shape)
def round_rows(x: Tensor, given: Tensor | None, fp8: bool) -> tuple[Tensor, Tensor]:
    """x (…, n) → codes (…, n padded), int8 or the bits of e4m3 in uint8, and scales (…, 1) float32;
    `given` is a static scale for all."""
    codes, scales = buffers(x, fp8)
    flat = rows_of(x)
    if flat.shape[0]:
        inner = codes.shape[-1]
        block = triton.next_power_of_2(inner)
        torch.library.wrap_triton(_round)[(flat.shape[0],)](
            flat, given, codes, scales, flat.shape[1], inner, FP8=fp8, BLOCK=block,
            num_warps=warps_for(block),
        )  # fmt: skip
    return codes, scales


def buffers(x: Tensor, fp8: bool) -> tuple[Tensor, Tensor]:
    """Empty codes and scales for rows of x."""
    lead = x.shape[:-1]
    inner = padded(x.shape[-1], INNER)
    codes = x.new_empty((*lead, inner), dtype=torch.uint8 if fp8 else torch.int8)
    return codes, x.new_empty((*lead, 1), dtype=torch.float32)


def warps_for(numbers: int) -> int:
    """Warps for so many numbers in registers, some 16 in each thread."""
    return min(max(numbers // 512, 1), 16)
