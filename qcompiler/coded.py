"""Numbers that lie in memory as 8-bit codes with a scale for each row, and look like floats.

A cache of keys and values that a program rounds by rows is handed out and in as this: a quarter of
float32's memory, half of bfloat16's, read as it is by a backend's kernel for attention. Anything
else that is done to it is done to its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler.errors import BadInput

READ_ONLY = (
    "a cache that is kept in 8 bits cannot be written to in place; take its numbers with .clone()"
)
SIZES = {torch.ops.aten.sym_size.int, torch.ops.aten.size.int}


class Coded(Tensor):
    """codes (…, n), int8 or the bits of e4m3 in uint8, times scales (…) float32, as a tensor (…, n)
    of `dtype`."""

    codes: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Coded:
        made: Coded = torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=dtype, device=codes.device
        )
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
        if func in SIZES:
            return func(args[0].codes, *args[1:], **kwargs)
        given = dict(enumerate(args)) | kwargs
        for place, argument in enumerate(func._schema.arguments):
            value = given.get(place, given.get(argument.name))
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and any(isinstance(v, Coded) for v in pytree.tree_leaves(value)):
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
    if not isinstance(x, Coded):
        return x
    codes = x.codes.view(torch.float8_e4m3fn) if x.codes.dtype == torch.uint8 else x.codes
    return codes.float().mul_(x.scales.unsqueeze(-1)).to(x.dtype)
