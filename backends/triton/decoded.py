"""y = x Wᵀ + b with weights W = s (q - z) in groups, decoded in registers: the operator.

16-bit activations meet 4-bit integers, e2m1 (MXFP4, NVFP4), int8 or e4m3; int8 ones, with a scale
for each token, 4-bit integers. Weights lie as `layout.py` says.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.backends.triton import codes
from qcompiler.backends.triton.operators import operator, rows_of
from qcompiler.backends.triton.products import few, many, may_start_early
from qcompiler.backends.triton.split import sum_parts
from qcompiler.backends.triton.tune import Config, best, bucket
from qcompiler.backends.triton.weights import BITS

FACTORS = {torch.int8: tl.int8, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
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
    given = (flat, x_scale, units, scale, zero, bias, group, rows, kind, dtype)
    shape = f"{tuple(units.shape)} {group} {zero is not None}"
    key = f"{kind} {bucket(flat.shape[0])} {shape} {flat.dtype} {dtype}"
    config = best(key, units, candidates(flat.shape[0]), lambda c: launch(c, *given))
    return launch(config, *given).reshape(*x.shape[:-1], rows)


def launch(
    config: Config, x: Tensor, x_scale: Tensor | None, units: Tensor, scale: Tensor,
    zero: Tensor | None, bias: Tensor | None, group: int, rows: int, kind: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    (tokens, width), (blocks, padded, lanes) = x.shape, units.shape
    planes = 8 * units.element_size() // BITS[kind]
    at_once = config.warps if config.apart else 1
    part = triton.cdiv(triton.cdiv(blocks, config.split), at_once) * at_once
    split = triton.cdiv(blocks, part)
    even = width == blocks * planes * lanes and blocks % at_once == 0
    early = even and may_start_early(units)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if config.apart:
        options["WARPS"] = config.warps
    if early:
        options["launch_pdl"] = True
    whole = zero is not None and zero.dtype == torch.uint8
    y = x.new_empty((split, tokens, rows), dtype=torch.float32 if split > 1 else dtype)
    grid = (triton.cdiv(rows, config.rows), triton.cdiv(tokens, config.tokens), split)
    torch.library.wrap_triton(few if config.apart else many)[grid](
        x, x_scale, units, scale, zero, None if split > 1 else bias, y,
        tokens, width, rows, padded, padded * lanes, lanes, blocks, part,
        SPAN=group // lanes, SHARED=math.gcd(planes, group // lanes), PLANES=planes, LANES=lanes,
        KIND=KINDS[kind].value, ZERO=0 if zero is None else 1 if whole else 2, EVEN=even,
        ONE=x.dtype == torch.int8 and scale.shape[0] == 1, DTYPE=FACTORS[x.dtype],
        ROWS=config.rows, TOKENS=config.tokens, EARLY=early, **options,
    )  # fmt: skip
    return y[0] if split == 1 else sum_parts(y, bias, dtype)


def candidates(tokens: int) -> list[Config]:
    """The first fits every GPU. Of rows, parts, warps and stages."""
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
    wide = 1 if tokens == 1 else max(8, bucket(tokens))
    apart = [(16, 1, 4, 2), (16, 1, 4, 3), (16, 1, 8, 2), (32, 1, 2, 3), (32, 1, 4, 3)]
    if tokens == 1:
        apart += [(16, 1, 8, 3), (32, 1, 8, 3), (16, 2, 4, 3), (64, 1, 2, 3)]
        together = []
    else:
        apart += [(32, 1, 4, 2), (64, 1, 2, 2), (32, 2, 2, 3), (32, 4, 2, 3)]
        together = [(64, 1, 4, 3), (64, 1, 4, 4), (64, 2, 4, 3), (64, 4, 4, 3), (128, 1, 4, 3)]
    return [
        Config(rows, wide, split=split, warps=warps, stages=stages, apart=i < len(apart))
        for i, (rows, split, warps, stages) in enumerate(apart + together)
    ]
