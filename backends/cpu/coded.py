"""A cache of rows that are rounded to int8 as they are appended, and kept as codes."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompiler.append import append
from qcompiler.backends.cpu.calls import by_rows, scratch
from qcompiler.backends.cpu.codegen.isa import host
from qcompiler.backends.cpu.codegen.layout import CHUNK
from qcompiler.backends.cpu.codegen.rows import Rounding, rows
from qcompiler.coded import Coded, numbers
from qcompiler.ops import fake_quantize

FORMAT = "int8:token:dynamic"
"""What the rows are rounded to."""
ROUNDING = Rounding(0)


def append_rows(past: Tensor, new: Tensor, axis: int) -> Tensor:
    """cat([past, round(new)], axis), new (…, n) rounded by rows; `axis` is not the last.

    Coded if `past` is, or is empty; numbers that were handed in stay what they are.
    """
    if isinstance(past, Coded) and past.codes.dtype != torch.int8:
        past = numbers(past)
    if not isinstance(past, Coded):
        if past.shape[axis]:
            return append(past, fake_quantize(new, FORMAT), axis)
        past = Coded(past.new_empty(past.shape, dtype=torch.int8), past.new_empty(past.shape[:-1]))
    codes, scales = _code(new)
    return Coded(append(past.codes, codes, axis), append(past.scales, scales, axis))


def _code(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (…, whole chunks) by rows: codes, and their scales (…)."""
    width = x.shape[-1]
    source, stride = by_rows(x)
    codes = torch.empty(x.shape, dtype=torch.int8)
    scales = torch.empty(x.shape[:-1])
    if x.numel():
        rows(host(), ROUNDING).bound(
            source.data_ptr(), codes.data_ptr(), scales.data_ptr(), scratch(4 * scales.numel()),
            0, source.data_ptr(), 0, 0, 0, 0,
            scales.numel(), width, stride, width, width // CHUNK, 0, 1,
        )()  # fmt: skip
    return codes, scales


_library = torch.library.Library("qc_cpu", "FRAGMENT")
_library.define("append_rows(Tensor past, Tensor new, int axis) -> Tensor")


def _append_rows(past: Tensor, new: Tensor, axis: int) -> Tensor:
    """An operator of torch must not return what it read."""
    return torch.cat([past, torch.ops.qc.fake_quantize(new, FORMAT)], axis)


_library.impl("append_rows", _append_rows, "CPU")
torch.library.register_fake("qc_cpu::append_rows", _append_rows, lib=_library)
APPEND_ROWS = torch.ops.qc_cpu.append_rows.default
