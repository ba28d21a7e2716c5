"""`qc_cpu::linear`: a linear layer by kernels that are generated for its format and this CPU.

    y = x̂ Ŵᵀ + b + residual        Ŵ: packed codes, x̂: before(x), rounded for each token or not

With rounded activations the products are sums of integers, exact; see `codegen/` for the kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qcompiler.backends.cpu.calls import AttendCall, LinearCall, RopeCall, group_of, scratch
from qcompiler.backends.cpu.codegen import layout
from qcompiler.backends.cpu.codegen.isa import host
from qcompiler.backends.cpu.prompt import attend_many
from qcompiler.coded import Coded, numbers
from qcompiler.formats import QFormat, QTensor
from qcompiler.formats.grid import spread

MOST_INPUTS = 32768
"""Inputs that are summed in 32 bits before a scale is applied."""
_library = torch.library.Library("qc_cpu", "FRAGMENT")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor? start, Tensor bias,"
    " Tensor? x_scale, Tensor? x_zero, str format, str activation, int out, *, str before='',"
    " Tensor? other=None, Tensor? gain=None, Tensor? shift=None, Tensor? residual=None) -> Tensor"
)


class Packed(NamedTuple):
    """A weight (out, in) as generated kernels take it."""

    weight: Tensor
    """uint8 (blocks, chunks, 64 bits), see `codegen/layout.py`."""
    scale: Tensor
    """float32, or float16 where that is exact: (blocks, groups, 16)."""
    zero: Tensor | None
    """Zero point of the unsigned codes, times the scale for int8 activations; float32 like it."""
    start: Tensor | None
    """Where integer sums begin, int32 like `scale`; for int8 activations with a zero point."""


def fits(out: int, width: int, fmt: QFormat) -> str | None:
    """Why there is no kernel for such a weight, or None."""
    group = group_of(fmt)
    if group % layout.CHUNK:
        return f"takes groups of a multiple of {layout.CHUNK} inputs; found {group}"
    if (inputs := min(group, width) or width) > MOST_INPUTS:
        return f"takes at most {MOST_INPUTS} inputs to a scale; found {inputs}"
    return None


def pack(q: QTensor, floating: bool, x_zero: int | None = None) -> Packed:
    """The weight of a kernel, for activations that are floating, or int8 with a zero point."""
    fmt, (out, width) = q.format, q.data.shape
    offset = 1 << (fmt.bits - 1) if fmt.signed else 0
    group = group_of(fmt)
    size = layout.padded(width, group or layout.CHUNK)
    codes = torch.nn.functional.pad(q.data + offset, (0, size - width), value=offset)
    scale = by_group(q.scale, q, group or width)
    half = scale.half()
    stored = half if half.isfinite().all() and torch.equal(half.float(), scale) else scale
    zero = start = None
    if q.zero is not None or offset == 0:
        point = torch.zeros_like(scale) if q.zero is None else by_group(q.zero, q, group or width)
        point = point.float() + offset
        zero = layout.pack_side(point if floating else scale * point, out)
    if x_zero is not None:
        # What symmetric codes stand for, or the codes themselves where zero points come later.
        meant = codes.int() - (offset if zero is None else 0)
        sums = meant.reshape(out, -1, group or size).sum(2, dtype=torch.int32)
        start = layout.pack_side(-x_zero * sums, out)
    weight = layout.pack(codes, fmt.bits, offset)
    return Packed(weight, layout.pack_side(stored, out), zero, start)


def pack_bias(bias: Tensor | None, out: int) -> Tensor:
    """A bias, zeros if there is none, for whole blocks."""
    full = torch.zeros(layout.padded(out, layout.OUTPUTS))
    if bias is not None:
        full[:out] = bias
    return full


def by_group(side: Tensor, q: QTensor, step: int) -> Tensor:
    """One number for each output and group: (out, groups)."""
    shape = tuple(q.data.shape)
    full = spread(side, shape, q.format)
    full = full.expand(shape[0], full.shape[1])
    return full[:, ::step] if full.shape[1] > 1 else full.expand(-1, -(-shape[1] // step))


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    start: Tensor | None,
    bias: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    format: str,
    activation: str,
    out: int,
    *,
    before: str = "",
    other: Tensor | None = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = x̂ Ŵᵀ + b + residual, x̂ = round(before(x)).

    x (…, in) floating point; `weight`, `scale` and `zero` as `pack` makes them; `bias` is padded to
    whole blocks of 16 outputs. `activation` is `float`, or a format of one scale for each token
    (found here) or for all (given as `x_scale`; with a zero point `x_zero`, less 128 for unsigned
    codes, whose part is in `start`). `before` is one of `codegen/before.py`, with
    what it takes: `other` of the shape of x, `gain` and `shift` (in,).
    """
    y = torch.empty(*x.shape[:-1], weight.shape[0] * layout.OUTPUTS)
    parameters = (weight, scale, zero, start, bias, x_scale, x_zero)
    LinearCall(
        x, y, parameters, format, activation, scratch,
        before=before, other=other, gain=gain, shift=shift, residual=residual,
    )()  # fmt: skip
    y = y if y.shape[-1] == out else y[..., :out].contiguous()
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _shape(
    x: Tensor, *parameters: Tensor | str | int | None, **others: Tensor | str | None
) -> Tensor:
    out = parameters[-1]
    assert isinstance(out, int)
    return x.new_empty((*x.shape[:-1], out))


_library.impl("linear", linear, "CPU")
torch.library.register_fake("qc_cpu::linear", _shape, lib=_library)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`qc::rope` of halves: x (batch, heads, tokens, d) float32, cos and sin broadcast to it."""
    y = torch.empty(x.shape)
    RopeCall(x, y, cos, sin)()
    return y


_library.define("rope(Tensor x, Tensor cos, Tensor sin) -> Tensor")
_library.impl("rope", rope, "CPU")
torch.library.register_fake("qc_cpu::rope", lambda x, cos, sin: x.new_empty(x.shape), lib=_library)


FEW = 4
"""Queries to a head up to which the generated kernel is the faster one."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """Attention of q (batch, heads, tokens, d) over k and v (batch, groups of heads, keys, d).

    The result lies in memory as (batch, tokens, heads, d), so that heads are joined without a copy.
    """
    batch, heads, tokens, width = q.shape
    plain = not causal and (mask is None or mask.dtype == torch.bool)
    plain = plain and all(p.dtype == torch.float32 and p.shape[0] == batch for p in (q, k, v))
    plain = plain and heads % k.shape[1] == 0
    if tokens > FEW or not plain or width % host().lanes or not k.shape[2]:
        return attend_many(q, numbers(k), numbers(v), mask, scale, causal)
    y = torch.empty(batch, tokens, heads, width).transpose(1, 2)
    if (
        isinstance(k, Coded)
        and isinstance(v, Coded)
        and k.codes.dtype == v.codes.dtype == torch.int8
    ):
        AttendCall(q, k.codes, v.codes, y, mask, scale, scratch, (k.scales, v.scales))()
    else:
        AttendCall(q, numbers(k), numbers(v), y, mask, scale, scratch)()
    return y


_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal) -> Tensor"
)
_library.impl("attend", attend, "CPU")
torch.library.register_fake(
    "qc_cpu::attend", lambda q, k, v, mask, scale, causal: torch.empty_like(q), lib=_library
)
