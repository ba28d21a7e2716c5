"""y = x Wᵀ + b with weights W = s (q - z) in groups, decoded in registers: the operator.

16-bit activations meet 4-bit integers, e2m1 (MXFP4, NVFP4), int8 or e4m3; int8 ones, with a scale
for each token, 4-bit integers. Weights lie as `layout.py` says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.backends.triton import codes
from qcompiler.backends.triton.few import few, few_options, may_be_whole
from qcompiler.backends.triton.operators import early, operator, rows_of
from qcompiler.backends.triton.products import many
from qcompiler.backends.triton.split import sum_parts
from qcompiler.backends.triton.tune import Config, best, bucket
from qcompiler.backends.triton.weights import BITS

FACTORS = {torch.int8: tl.int8, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
ROW = 1 << 24
"""The group, in planes, of rows that have one scale."""
KINDS = {"int4": codes.INT4, "fp4": codes.FP4, "int8": codes.INT8, "e4m3": codes.E4M3}


def _shape(
    x: Tensor, x_scale: Tensor | None, units: Tensor, scale: Tensor, zero: Tensor | None,
    bias: Tensor | None, group: int, rows: int, kind: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], rows), dtype=dtype)


@operator(_shape)
def linear_decoded(
    x: Tensor, x_scale: Tensor | None, units: Tensor, scale: Tensor, zero: Tensor | None,
    bias: Tensor | None, group: int, rows: int, kind: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x (…, in) floating point, rounded to 16 bits if it is wider, or int8 with x_scale (…, 1) as
    `round_rows` makes them; units, scale and zero as `layout.py` has them, `group` inputs with one
    scale → (…, rows) of `dtype`."""
    flat = rows_of(x)
    if x.dtype not in (torch.int8, torch.float16):
        flat = flat.to(torch.bfloat16)
    if flat.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], rows), dtype=dtype)
    given = (flat, x_scale, scale, zero, bias, group, rows, kind, dtype)
    shape = f"{tuple(units.shape)} {group} {zero is not None}"
    key = f"{kind} {bucket(flat.shape[0])} {shape} {flat.dtype} {dtype}"
    lifts = kind == "int4" and flat.dtype == torch.bfloat16
    config = best(
        key,
        (units,),
        candidates(len(flat), lifts, units.shape[0]),
        lambda c, u: launch(c, u, *given),
    )
    return launch(config, units, *given).reshape(*x.shape[:-1], rows)


def launch(
    config: Config, units: Tensor, x: Tensor, x_scale: Tensor | None, scale: Tensor,
    zero: Tensor | None, bias: Tensor | None, group: int, rows: int, kind: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    (tokens, width), (blocks, padded, lanes) = x.shape, units.shape
    planes = 8 * units.element_size() // BITS[kind]
    at_once = config.warps if config.apart else 1
    part = triton.cdiv(triton.cdiv(blocks, config.split), at_once) * at_once
    split = triton.cdiv(blocks, part)
    span = group // lanes if scale.shape[0] > 1 else ROW
    even = width == blocks * planes * lanes and blocks % at_once == 0
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if config.apart:
        options = few_options(config, tokens, part, units)
    whole = zero is not None and zero.dtype == torch.uint8
    y = x.new_empty((split, tokens, rows), dtype=torch.float32 if split > 1 else dtype)
    grid = (triton.cdiv(rows, config.rows), triton.cdiv(tokens, config.tokens), split)
    torch.library.wrap_triton(few if config.apart else many)[grid](
        x, x_scale, units, scale, zero, None if split > 1 else bias, y,
        tokens, width, rows, padded, padded * lanes, lanes, blocks, part,
        SPAN=span, SHARED=math.gcd(planes, span), PLANES=planes, LANES=lanes,
        KIND=KINDS[kind].value, ZERO=0 if zero is None else 1 if whole else 2, EVEN=even,
        ONE=scale.shape[0] == 1, DTYPE=FACTORS[x.dtype],
        ROWS=config.rows, TOKENS=config.tokens, **options, **early(units),
    )  # fmt: skip
    return y[0] if split == 1 else sum_parts(y, bias, dtype)


def candidates(tokens: int, lifts: bool, blocks: int) -> list[Config]:
    """The first fits every GPU; `lifts`: the numbers are some that `codes.lifted` makes; `blocks`:
    those of a row."""
    if tokens > 64:
        return [
            Config(64, 64, warps=4, stages=2),
            Config(128, 128, warps=8, stages=2),
            Config(64, 128, warps=4, stages=2),
        ]
    if tokens > 16:
        wide = 32 if tokens <= 32 else 64
        return [
            Config(rows, wide, split=split, warps=4, stages=stages)
            for rows, split, stages in ((64, 1, 2), (64, 2, 3), (64, 1, 3), (128, 1, 3), (64, 4, 3))
        ]
    wide = max(8, bucket(tokens))

    def few(rows: int, warps: int, registers: int = 0, stages: int = 1, **flags: Any) -> Config:
        # With 128 registers 16 warps are on a multiprocessor at once, with 80 there are 24.
        return Config(
            rows, wide, warps=warps, stages=stages, apart=True, registers=registers, **flags
        )

    def whole(rows: int, warps: int, registers: int = 0) -> list[Config]:
        fits = may_be_whole(rows, warps, blocks)
        return [few(rows, warps, registers, whole=True)] if fits else []

    if wide >= 16:
        together = ((1, 2), (1, 4), (4, 2), (8, 2), (4, 4))
        return [
            few(16, 8),
            few(16, 8, 128),
            few(32, 4),
            few(16, 4, 128),
            few(16, 8, 168, stages=2),
            *whole(32, 8),
            *whole(32, 8, 128),
            *(Config(64, wide, split=split, warps=w, stages=4) for split, w in together),
            Config(128, wide, split=4, warps=4, stages=4),
        ]
    return [
        few(16, 8),
        few(16, 8, 96),
        few(16, 8, 128, stages=2),
        few(16, 4, 96),
        few(16, 4, 128, stages=2),
        few(32, 2, 128),
        few(32, 8, 128),
        *whole(16, 8, 80),
        *whole(16, 4, 128),
        *whole(32, 8, 128),
        *((few(32, 4, late=True, ordered=True), few(32, 8, 128, late=True)) if lifts else ()),
    ]
