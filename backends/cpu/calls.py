"""Calls of generated kernels, bound to the memory that they work on: made once, run many times.

A call holds addresses, not tensors: whoever makes it keeps the tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from qcompiler.backends.cpu.codegen import layout
from qcompiler.backends.cpu.codegen.attention import attention, heads_at_once
from qcompiler.backends.cpu.codegen.before import Before
from qcompiler.backends.cpu.codegen.dots import in_16_bits
from qcompiler.backends.cpu.codegen.frame import Kernel
from qcompiler.backends.cpu.codegen.isa import host
from qcompiler.backends.cpu.codegen.linear import linear as linear_kernel
from qcompiler.backends.cpu.codegen.rope import rope as rope_kernel
from qcompiler.backends.cpu.codegen.rows import Rounding, rows
from qcompiler.backends.cpu.codegen.tile import Spec
from qcompiler.backends.cpu.codegen.widen import widen
from qcompiler.errors import BadInput
from qcompiler.formats import QFormat

ALONE = 1 << 19
"""Products below which a second thread costs more than it brings."""
ALONE_ROWS = 1 << 15
"""The same for numbers to be rounded."""
WIDENED = 2
"""Tokens for which it pays to make int16 of their codes, where products are taken in 16 bits."""
LINE = 64
"""Bytes left free behind a row of activations: else all rows fall into one set of a cache."""
Parameters = tuple[
    Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None
]
"""weight, scale, zero, start, bias, x_scale, x_zero: see `generated.Packed`."""


def group_of(fmt: QFormat) -> int:
    """Inputs that share a scale, in chunks of 32; 0 for all."""
    inputs = fmt.block[-1] if fmt.block else -1
    return 0 if inputs == -1 else inputs


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
    ready: bool,
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
    spec = Spec(weight.bits, group, half, zeros, floating, ready, shifted, residual)
    unit = group or layout.CHUNK
    return Plan(rows(host(), rounding), linear_kernel(host(), spec), group, unit, floating)


class LinearCall:
    """y = round(before(x)) Ŵᵀ + b + residual; see `generated.linear`."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        parameters: Parameters,
        format: str,
        activation: str,
        scratch: Callable[[int], int],
        *,
        before: str = "",
        other: Tensor | None = None,
        gain: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        """`y` (…, whole blocks of outputs) float32, contiguous; `scratch` gives the address of so
        many bytes to work in."""
        weight, scale, zero, start, bias, x_scale, x_zero = parameters
        width, padded = x.shape[-1], y.shape[-1]
        source, x_stride = by_rows(x)
        tokens = source.numel() // width
        ready = (
            tokens >= WIDENED
            and activation != "float"
            and in_16_bits(host(), QFormat.parse(format).bits)
        )
        how = _plan(
            format, activation, before, scale.dtype == torch.float16, zero is not None,
            x_scale is not None, start is not None, residual is not None, ready, host().name,
        )  # fmt: skip
        full = layout.padded(width, how.unit)
        chunks, groups = full // layout.CHUNK, full // how.group if how.group else 1
        if chunks != weight.shape[1]:  # kernels trust sizes
            raise BadInput(
                f"qc_cpu::linear: {width} inputs make {chunks} chunks of {layout.CHUNK}; its "
                f"weight has {weight.shape[1]}"
            )
        stride = full * (4 if how.floating else 1) + LINE
        threads = torch.get_num_threads() if tokens * width * padded > ALONE else 1
        members = threads if tokens * width > ALONE_ROWS else 1
        wide = 2 * full + LINE if ready else 0
        room = tokens * (stride + wide + 4 * groups + 4) + 4 * full * members
        codes = scratch(room)
        totals = codes + tokens * stride
        scales = totals + 4 * tokens * groups
        work = scales + 4 * tokens
        inputs = room + codes - tokens * wide if ready else codes
        gain, shift = (p if p is None else p.float().contiguous() for p in (gain, shift))
        if residual is not None and residual.shape[-1] != padded:
            residual = torch.nn.functional.pad(residual.float(), (0, padded - residual.shape[-1]))
        second, other_stride = (source, x_stride) if other is None else by_rows(other)
        more, more_stride = (y, 0) if residual is None else by_rows(residual)
        self._held = (source, second, more, gain, shift)
        self._rows = how.rows.bound(
            source.data_ptr(), codes, scales, totals, address(x_zero), second.data_ptr(),
            address(gain), address(shift), work, address(x_scale),
            tokens, width, x_stride, stride, chunks, other_stride, members,
        )  # fmt: skip
        self._widen = None
        if ready:
            self._widen = widen(host()).bound(codes, inputs, tokens, full, stride, wide, members)
        self._product = how.product.bound(
            y.data_ptr(), inputs, totals, scales, weight.data_ptr(), scale.data_ptr(),
            address(zero), bias.data_ptr(), more.data_ptr(), address(start), address(x_zero),
            chunks, wide or stride, 4 * padded, more_stride, tokens, weight.shape[0], threads,
        )  # fmt: skip

    def __call__(self) -> None:
        """Run it."""
        self._rows()
        if self._widen:
            self._widen()
        self._product()


class RopeCall:
    """`qc::rope` of halves from x to y, (batch, heads, tokens, d) float32 in any memory order."""

    def __init__(self, x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> None:
        wide = [p.expand(x.shape) for p in (x, cos, sin)]
        wide = [y, *(p if p.stride(-1) == 1 else p.contiguous() for p in wide)]
        self._held = wide
        strides = [4 * n for p in wide for n in p.stride()[:-1]]
        threads = torch.get_num_threads() if x.numel() > ALONE_ROWS else 1
        self._run = rope_kernel(host()).bound(
            *(p.data_ptr() for p in wide), *x.shape[:-1], x.shape[-1] // 2, *strides, threads
        )

    def __call__(self) -> None:
        """Run it."""
        self._run()


class AttendCall:
    """y = softmax(q Kᵀ scale) V, of float32 (batch, heads, tokens, d) whose heads have whole
    vectors; `mask` is bool and broadcasts to (batch, heads, tokens, keys). With `scales` (batch,
    heads, tokens) k and v are int8."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        y: Tensor,
        mask: Tensor | None,
        scale: float,
        scratch: Callable[[int], int],
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        isa = host()
        batch, heads, tokens, width = q.shape
        past = k.shape[2]
        seen = q if mask is None else mask.expand(batch, heads, tokens, past)
        more = (q, q) if scales is None else (s.unsqueeze(-1) for s in scales)
        parts = [p if p.stride(-1) == 1 else p.contiguous() for p in (y, q, k, v, seen, *more)]
        factor = torch.tensor([scale])
        threads = torch.get_num_threads() if batch * heads * past * width > ALONE else 1
        together = heads_at_once(heads // k.shape[1])
        work = scratch(4 * threads * together * (past + isa.lanes))
        self._held = (*parts, factor)
        strides = [n * p.element_size() for p in parts for n in p.stride()[:-1]]
        self._run = attention(isa, width, mask is not None, scales is not None, together).bound(
            *(p.data_ptr() for p in (*parts, factor)), work,
            batch, heads, tokens, past, heads // k.shape[1], *strides, threads,
        )  # fmt: skip

    def __call__(self) -> None:
        """Run it."""
        self._run()


def by_rows(x: Tensor) -> tuple[Tensor, int]:
    """`x` in float32 as rows that lie one like the other, and the bytes from one to the next."""
    x = x if x.dtype == torch.float32 else x.float()
    if x.is_contiguous():
        return x, 4 * x.shape[-1]
    axes = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    even = all(outer[1] == inner[1] * inner[0] for outer, inner in pairwise(axes))
    if x.stride(-1) != 1 or not even:
        x = x.contiguous()
        axes = [(1, x.shape[-1])]
    return x, 4 * (axes[-1][1] if axes else x.shape[-1])


def address(x: Tensor | None) -> int:
    """Where it lies, or 0."""
    return 0 if x is None else x.data_ptr()


_own = threading.local()


def scratch(size: int, use: str = "work") -> int:
    """Address of memory that this thread may use until it asks again for the same use."""
    held: Tensor | None = getattr(_own, use, None)
    if held is None or held.numel() < size:
        held = torch.empty(size, dtype=torch.uint8)
        setattr(_own, use, held)
    return held.data_ptr()
