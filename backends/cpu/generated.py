"""`qc_cpu::linear`: a linear layer by kernels that are generated for its format and this CPU.

    y = x̂ Ŵᵀ + b        Ŵ: packed codes, x̂: x rounded for each token, or x itself

With rounded activations the products are sums of integers, exact; see `codegen/` for the kernels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qcompiler.backends.cpu.codegen import layout
from qcompiler.backends.cpu.codegen.frame import Kernel
from qcompiler.backends.cpu.codegen.isa import host
from qcompiler.backends.cpu.codegen.linear import linear as linear_kernel
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
    "linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor bias, Tensor? x_scale,"
    " Tensor? x_zero, str format, str activation, int out) -> Tensor"
)


class Packed(NamedTuple):
    """A weight (out, in) as generated kernels take it."""

    weight: Tensor
    """uint8 (blocks, chunks, 64 bits), see `codegen/layout.py`."""
    scale: Tensor
    """float32, or float16 where that is exact: (blocks, groups, 16)."""
    zero: Tensor | None
    """Scale times zero point, both of the unsigned codes; float32 like `scale`."""


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


def pack(q: QTensor) -> Packed:
    """The weight of a kernel."""
    fmt, (out, width) = q.format, q.data.shape
    offset = 1 << (fmt.bits - 1) if fmt.signed else 0
    step = group_of(fmt) or width
    size = layout.padded(width, group_of(fmt) or layout.CHUNK)
    codes = torch.nn.functional.pad(q.data + offset, (0, size - width), value=offset)
    scale = _by_group(q.scale, q, step)
    half = scale.half()
    stored = half if half.isfinite().all() and torch.equal(half.float(), scale) else scale
    zero = None
    if q.zero is not None or offset == 0:
        point = offset if q.zero is None else _by_group(q.zero.float(), q, step) + offset
        zero = layout.pack_side(scale * point, out)
    return Packed(layout.pack(codes, fmt.bits, offset), layout.pack_side(stored, out), zero)


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
    weight: QFormat, activation: str, half: bool, zeros: bool, static: bool, isa: str
) -> Plan:
    group, floating = group_of(weight), activation == "float"
    rounding = Rounding(group, floating=True)
    if not floating:
        fmt = QFormat.parse(activation)
        lower = 0 if fmt.signed else 128
        rounding = Rounding(
            group, fmt.qmin - lower, fmt.qmax - lower, fmt.top, fmt.clip, static=static
        )
    spec = Spec(weight.bits, group, half, zeros, floating)
    return Plan(
        rows(host(), rounding),
        linear_kernel(host(), spec),
        group,
        group or layout.CHUNK,
        floating,
    )


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    format: str,
    activation: str,
    out: int,
) -> Tensor:
    """y = x̂ Ŵᵀ + b, x (…, in) floating point, `weight`, `scale` and `zero` as `pack` makes them.

    `activation` is `float`, or a format of one scale for each token (found here) or for all (given
    as `x_scale`, with the zero point of unsigned codes less 128 as `x_zero`, whose part in y is in
    `bias` already). `bias` is padded to whole blocks of 16 outputs.
    """
    width = x.shape[-1]
    source = x.reshape(-1, width).float().contiguous()
    tokens = source.shape[0]
    how = _plan(
        QFormat.parse(format),
        activation,
        scale.dtype == torch.float16,
        zero is not None,
        x_scale is not None,
        host().name,
    )
    full = layout.padded(width, how.unit)
    chunks, groups = full // layout.CHUNK, full // how.group if how.group else 1
    stride = full * (4 if how.floating else 1) + LINE
    blocks = weight.shape[0]
    threads = torch.get_num_threads() if tokens * width * out > ALONE else 1
    codes = torch.empty(tokens * stride, dtype=torch.uint8)
    totals = torch.empty(tokens * groups, dtype=torch.int32)
    scales = torch.empty(tokens) if x_scale is None else x_scale.flatten().repeat(tokens)
    y = torch.empty(tokens, blocks * layout.OUTPUTS)
    shift = 0 if x_zero is None else x_zero.data_ptr()
    how.rows(
        *(t.data_ptr() for t in (source, codes, scales, totals)),
        shift,
        *(tokens, width, 4 * width, stride, chunks),
        threads if tokens * width > ALONE_ROWS else 1,
    )
    how.product(
        *(t.data_ptr() for t in (y, codes, totals, scales, weight, scale)),
        0 if zero is None else zero.data_ptr(),
        *(bias.data_ptr(), chunks, stride, 4 * y.shape[1], tokens, blocks, threads),
    )
    if y.shape[1] != out:
        y = y[:, :out].contiguous()
    return y.to(x.dtype).reshape(*x.shape[:-1], out)


def _shape(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    format: str,
    activation: str,
    out: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))


_library.impl("linear", linear, "CPU")
torch.library.register_fake("qc_cpu::linear", _shape, lib=_library)
