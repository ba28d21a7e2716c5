"""Numbers that lie in memory as int8 with a scale for each row, and look like float32.

A cache of keys and values that a program rounds by rows is handed out and in as this: a quarter of
the memory, read as it is by the kernel for attention. Anything else that is done to it is done to
its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler.append import append
from qcompiler.backends.cpu.calls import by_rows, scratch
from qcompiler.backends.cpu.codegen.isa import host
from qcompiler.backends.cpu.codegen.layout import CHUNK
from qcompiler.backends.cpu.codegen.rows import Rounding, rows
from qcompiler.errors import BadInput
from qcompiler.ops import fake_quantize

FORMAT = "int8:token:dynamic"
"""What the rows are rounded to."""
ROUNDING = Rounding(0)
READ_ONLY = (
    "a cache that is kept in 8 bits cannot be written to in place; take its numbers with .clone()"
)


class Coded(Tensor):
    """codes (…, n) int8 times scales (…) float32, as a float32 tensor (…, n)."""

    codes: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor) -> Coded:
        made: Coded = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        made.codes, made.scales = codes, scales
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares the disabled one
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = dict(enumerate(args)) | kwargs
        for place, argument in enumerate(func._schema.arguments):
            value = given.get(place, given.get(argument.name))
            if isinstance(value, Coded) and argument.alias_info and argument.alias_info.is_write:
                raise BadInput(READ_ONLY)
        args, kwargs = pytree.tree_map_only(Coded, numbers, (args, kwargs))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return numbers(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: object) -> Tensor:
        return numbers(self)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise BadInput(READ_ONLY)

    def tolist(self) -> Any:
        return numbers(self).tolist()

    def numpy(self, *, force: bool = False) -> Any:
        return numbers(self).numpy(force=force)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]  # torch's has no types
        return f"Coded({[*self.shape]}, {self.codes.nbytes + self.scales.nbytes} bytes)"


def numbers(x: Tensor) -> Tensor:
    """The same values as an ordinary tensor."""
    return x.codes.float().mul_(x.scales.unsqueeze(-1)) if isinstance(x, Coded) else x


def append_rows(past: Tensor, new: Tensor, axis: int) -> Tensor:
    """cat([past, round(new)], axis), new (…, n) rounded by rows; `axis` is not the last.

    Coded if `past` is, or is empty; numbers that were handed in stay what they are.
    """
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
