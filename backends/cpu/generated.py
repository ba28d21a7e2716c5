"""`qc_cpu::linear`: a linear layer by kernels that are generated for its format and this CPU.

    y = x̂ Ŵᵀ + b + residual        Ŵ: packed codes, x̂: before(x), rounded for each token or not

With rounded activations the products are sums of integers, exact; see `codegen/` for the kernels.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qcompiler.backends.cpu.codegen import layout
from qcompiler.backends.cpu.codegen.before import Before
from qcompiler.backends.cpu.codegen.frame import Kernel
from qcompiler.backends.cpu.codegen.isa import host
from qcompiler.backends.cpu.codegen.linear import linear as linear_kernel
from qcompiler.backends.cpu.codegen.rope import rope as rope_kernel
from qcompiler.backends.cpu.codegen.rows import Rounding, rows
from qcompiler.backends.cpu.codegen.tile import Spec
from qcompiler.formats import QFormat, QTensor
from qcompiler.formats.grid import spread

MOST_INPUTS = 32768
"""Inputs that are summed in 32 bits before a scale is applied."""
ALONE = 1 << 19
"""Products below which a second thread costs more than it brings."""
ALONE_ROWS = 1 << 15
"""The same for numbers to be rounded."""
LINE = 64
"""Bytes between rows of activations, so that they do not all fall into one set of a cache."""

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


def group_of(fmt: QFormat) -> int:
    """Inputs that share a scale, in chunks of 32; 0 for all."""
    inputs = fmt.block[-1] if fmt.block else -1
    return 0 if inputs == -1 else inputs


def fits(out: int, width: int, fmt: QFormat) -> str | None:
    """Why there is no kernel for such a weight, or None."""
    group = group_of(fmt)
    if group % layout.CHUNK:
        return f"takes groups of a multiple of {layout.CHUNK} inputs; found {group}"
    if not group and width > MOST_INPUTS:
        return f"takes at most {MOST_INPUTS} inputs to a scale; found {width}"
    return None


def pack(q: QTensor, floating: bool, x_zero: int | None = None) -> Packed:
    """The weight of a kernel, for activations that are floating, or int8 with a zero point."""
    fmt, (out, width) = q.format, q.data.shape
    offset = 1 << (fmt.bits - 1) if fmt.signed else 0
    group = group_of(fmt)
    size = layout.padded(width, group or layout.CHUNK)
    codes = torch.nn.functional.pad(q.data + offset, (0, size - width), value=offset)
    scale = _by_group(q.scale, q, group or width)
    half = scale.half()
    stored = half if half.isfinite().all() and torch.equal(half.float(), scale) else scale
    zero = start = None
    if q.zero is not None or offset == 0:
        point = torch.zeros_like(scale) if q.zero is None else _by_group(q.zero, q, group or width)
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


def _by_group(side: Tensor, q: QTensor, step: int) -> Tensor:
    """One number for each output and group: (out, groups)."""
    shape = tuple(q.data.shape)
    full = spread(side, shape, q.format)
    full = full.expand(shape[0], full.shape[1])
    return full[:, ::step] if full.shape[1] > 1 else full.expand(-1, -(-shape[1] // step))


class Plan(NamedTuple):
    """How a call is done."""

    rows: Kernel
    product: Kernel
    group: int
    unit: int
    """Inputs that rows are padded to a multiple of."""
    floating: bool


@lru_cache(maxsize=256)
def _plan(
    format: str,
    activation: str,
    before: str,
    half: bool,
    zeros: bool,
    static: bool,
    shifted: bool,
    residual: bool,
    isa: str,
) -> Plan:
    weight = QFormat.parse(format)
    group, floating = group_of(weight), activation == "float"
    first = Before.parse(before)
    rounding = Rounding(group, floating=True, before=first)
    if not floating:
        fmt = QFormat.parse(activation)
        lower = 0 if fmt.signed else 128
        rounding = Rounding(
            group,
            fmt.qmin - lower,
            fmt.qmax - lower,
            fmt.top,
            fmt.clip,
            static=static,
            before=first,
        )
    spec = Spec(weight.bits, group, half, zeros, floating, shifted, residual)
    unit = group or layout.CHUNK
    return Plan(rows(host(), rounding), linear_kernel(host(), spec), group, unit, floating)


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
    width = x.shape[-1]
    source, x_stride = _by_rows(x)
    tokens = source.numel() // width
    how = _plan(
        format,
        activation,
        before,
        scale.dtype == torch.float16,
        zero is not None,
        x_scale is not None,
        start is not None,
        residual is not None,
        host().name,
    )
    full = layout.padded(width, how.unit)
    chunks, groups = full // layout.CHUNK, full // how.group if how.group else 1
    stride = full * (4 if how.floating else 1) + LINE
    blocks = weight.shape[0]
    threads = torch.get_num_threads() if tokens * width * out > ALONE else 1
    members = threads if tokens * width > ALONE_ROWS else 1
    codes = _scratch(tokens * (stride + 4 * groups + 4) + 4 * full * members)
    totals = codes + tokens * stride
    scales = totals + 4 * tokens * groups
    work = scales + 4 * tokens
    repeated = None if x_scale is None else x_scale.flatten().repeat(tokens)
    if repeated is not None:
        scales = repeated.data_ptr()
    padded = blocks * layout.OUTPUTS
    y = torch.empty(*x.shape[:-1], padded)
    second, other_stride = (source, x_stride) if other is None else _by_rows(other)
    more, more_stride = (y, 0) if residual is None else _by_rows(residual)
    how.rows(
        source.data_ptr(), codes, scales, totals, _address(x_zero), second.data_ptr(),
        _address(gain), _address(shift), work,
        tokens, width, x_stride, stride, chunks, other_stride, members,
    )  # fmt: skip
    how.product(
        y.data_ptr(), codes, totals, scales, weight.data_ptr(), scale.data_ptr(),
        _address(zero), bias.data_ptr(), more.data_ptr(), _address(start), _address(x_zero),
        chunks, stride, 4 * padded, more_stride, tokens, blocks, threads,
    )  # fmt: skip
    if padded != out:
        y = y[..., :out].contiguous()
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _by_rows(x: Tensor) -> tuple[Tensor, int]:
    """`x` in float32 as rows that lie one like the other, and the bytes from one to the next."""
    x = x if x.dtype == torch.float32 else x.float()
    shape, strides = x.shape, x.stride()
    even = all(
        strides[i] == strides[i + 1] * shape[i + 1] or shape[i] == 1 for i in range(x.ndim - 2)
    )
    if strides[-1] != 1 or not even:
        x = x.contiguous()
    return x, 4 * (x.stride(-2) if x.ndim > 1 else x.shape[-1])


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


_own = threading.local()


def _scratch(size: int) -> int:
    """Address of memory that this thread may use until it asks again."""
    held: Tensor | None = getattr(_own, "scratch", None)
    if held is None or held.numel() < size:
        held = _own.scratch = torch.empty(size, dtype=torch.uint8)
    return held.data_ptr()


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
    y = torch.empty_like(x)
    parts = [p if p.stride(-1) == 1 else p.contiguous() for p in (x, cos, sin)]
    wide = [y, parts[0], *(p.expand(x.shape) for p in parts[1:])]
    strides = [4 * n for p in wide for n in p.stride()[:-1]]
    threads = torch.get_num_threads() if x.numel() > ALONE_ROWS else 1
    rope_kernel(host())(
        *(p.data_ptr() for p in wide), *x.shape[:-1], x.shape[-1] // 2, *strides, threads
    )
    return y


_library.define("rope(Tensor x, Tensor cos, Tensor sin) -> Tensor")
_library.impl("rope", rope, "CPU")
torch.library.register_fake("qc_cpu::rope", lambda x, cos, sin: torch.empty_like(x), lib=_library)
