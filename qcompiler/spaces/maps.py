"""How a map acts on channels: the operators that it is in a program.

A value with its channels on the last axis, x, becomes x Tᵀ; whoever reads it gets W T⁻¹. Both are
ordinary operators on the map's own parameter, which thereby stays one thing: a later pass may train
it, and `fold` evaluates it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompiler.cores import refuses_transform
from qcompiler.edit import Edit
from qcompiler.errors import BadInput

aten = torch.ops.aten
SINGULAR = 1e6
"""A matrix with a larger condition number loses too many digits to its inverse."""


class Map(ABC):
    """T, and what it takes to apply it along the last axis."""

    size: int
    """Channels."""
    maps: tuple[int, ...] = ()
    """Sizes of the leading axes of a map that differs by index (per head)."""
    kind: ClassVar[str]
    """What it is to a space: `orthogonal`, `invertible` or `permutation`."""
    wide: ClassVar[bool] = True
    """Whether it does arithmetic, for which weights go to float64."""

    def __init__(self, edit: Edit, source: fx.Node) -> None:
        self.edit = edit
        self.source = source

    @abstractmethod
    def forward(self, x: fx.Node, order: Sequence[int] = ()) -> fx.Node:
        """x Tᵀ. `order` says in which order the axes `maps` stand in front of x's last two."""

    def backward(self, x: fx.Node, order: Sequence[int] = ()) -> fx.Node:
        """x T⁻¹; the same as `forward` where T is orthogonal."""
        return self.forward(x, order)


class Matrix(Map):
    """A parameter T, (*maps, n, n) in float64: in float32 a rotation is one to 1e-7 only."""

    def __init__(
        self, edit: Edit, like: fx.Node, value: Tensor, name: str, kind: str = "orthogonal"
    ) -> None:
        value = _orthogonal(value) if kind == "orthogonal" else _invertible(value)
        super().__init__(edit, edit.new_param(name, value, like=like))
        self.size, self.maps = value.shape[-1], tuple(value.shape[:-2])
        self.kind = kind  # type: ignore[misc]
        edit.free(self.source, kind)

    def forward(self, x: fx.Node, order: Sequence[int] = ()) -> fx.Node:
        return self._times(x, self._turned(self.source, order, x), x)

    def backward(self, x: fx.Node, order: Sequence[int] = ()) -> fx.Node:
        if self.kind == "orthogonal":
            return self.forward(x, order)
        inverse = self.edit.call(aten.linalg_inv.default, self.source, like=x)
        turned = self.edit.call(aten.transpose.int, inverse, -2, -1, like=x)
        return self._times(x, self._turned(turned, order, x), x)

    def _turned(self, source: fx.Node, order: Sequence[int], like: fx.Node) -> fx.Node:
        """Tᵀ with the axes of `maps` in the order of the value that it meets."""
        if list(order) != sorted(order):
            rank = len(self.maps)
            axes = [*order, rank, rank + 1]
            source = self.edit.call(aten.permute.default, source, axes, like=like)
        return self.edit.call(aten.transpose.int, source, -2, -1, like=like)

    def _times(self, x: fx.Node, factor: fx.Node, like: fx.Node) -> fx.Node:
        dtype = x.meta["val"].dtype
        if factor.meta["val"].dtype != dtype:
            factor = self.edit.call(aten.to.dtype, factor, dtype, like=like)
        return self.edit.call(aten.matmul.default, x, factor, like=like)


class Hadamard(Map):
    """R = (O ⊗ H) diag(±1) / √n as a fast transform: n log n instead of n² (see `qc::hadamard`)."""

    kind = "orthogonal"

    def __init__(self, edit: Edit, like: fx.Node, signs: Tensor, name: str, core: int = 1) -> None:
        if signs.ndim != 1 or not bool((signs.abs() == 1).all()):
            raise BadInput(f"signs are a vector of 1 and -1; found {list(signs.shape)}")
        if reason := refuses_transform(len(signs), core):
            raise BadInput(reason)
        super().__init__(edit, edit.new_param(name, signs, like=like))
        self.size, self.core = len(signs), core

    def forward(self, x: fx.Node, order: Sequence[int] = ()) -> fx.Node:
        signs = self.source
        if signs.meta["val"].dtype != x.meta["val"].dtype:
            signs = self.edit.call(aten.to.dtype, signs, x.meta["val"].dtype, like=x)
        signed = self.edit.call(aten.mul.Tensor, x, signs, like=x)
        core = () if self.core == 1 else (self.core,)
        return self.edit.call(torch.ops.qc.hadamard.default, signed, *core, like=x)


class Kronecker(Map):
    """T = A ⊗ B: n = n₁ n₂ channels by two small matrices (FlatQuant, Sun et al. 2024, eq. 4)."""

    kind = "invertible"

    def __init__(self, edit: Edit, like: fx.Node, left: Tensor, right: Tensor, name: str) -> None:
        first, second = _invertible(left), _invertible(right)
        if first.ndim != 2 or second.ndim != 2:
            raise BadInput("one square matrix is expected for each factor; found several")
        if not float(torch.linalg.cond(first) * torch.linalg.cond(second)) < SINGULAR:
            raise BadInput("an invertible product is expected; this one is nearly singular")
        super().__init__(edit, edit.new_param(f"{name}.left", first, like=like))
        self._right = edit.new_param(f"{name}.right", second, like=like)
        self.size = len(left) * len(right)
        for node in (self.source, self._right):
            edit.free(node, "invertible")

    def forward(self, x: fx.Node, order: Sequence[int] = ()) -> fx.Node:
        edit = self.edit
        left = self.source
        right = edit.call(aten.transpose.int, self._right, 0, 1, like=x)
        return self._both(x, left, right)

    def backward(self, x: fx.Node, order: Sequence[int] = ()) -> fx.Node:
        edit = self.edit
        left = edit.call(aten.linalg_inv.default, self.source, like=x)
        left = edit.call(aten.transpose.int, left, 0, 1, like=x)
        right = edit.call(aten.linalg_inv.default, self._right, like=x)
        return self._both(x, left, right)

    def _both(self, x: fx.Node, left: fx.Node, right: fx.Node) -> fx.Node:
        """A X Bᵀ with X the last axis as (n₁, n₂)."""
        edit, dtype = self.edit, x.meta["val"].dtype
        shape = list(x.meta["val"].shape)
        sizes = [self.source.meta["val"].shape[0], self._right.meta["val"].shape[0]]
        left, right = (
            n if n.meta["val"].dtype == dtype else edit.call(aten.to.dtype, n, dtype, like=x)
            for n in (left, right)
        )
        folded = edit.call(aten.unflatten.int, x, -1, sizes, like=x)
        # The value is always the first operand, by which an expression on an edge is called.
        mixed = edit.call(aten.matmul.default, folded, right, like=x)
        mixed = edit.call(aten.transpose.int, mixed, -2, -1, like=x)
        turned = edit.call(aten.transpose.int, left, 0, 1, like=x)
        mixed = edit.call(aten.matmul.default, mixed, turned, like=x)
        mixed = edit.call(aten.transpose.int, mixed, -2, -1, like=x)
        return edit.call(aten.flatten.using_ints, mixed, len(shape) - 1, -1, like=x)


class Order(Map):
    """Channel i becomes what channel order[i] was."""

    kind = "permutation"
    wide = False

    def __init__(self, edit: Edit, like: fx.Node, order: Tensor, name: str) -> None:
        whole = order.ndim == 1 and not order.is_floating_point()
        if not whole or not torch.equal(order.sort().values, torch.arange(len(order))):
            found = f"{str(order.dtype).removeprefix('torch.')} {list(order.shape)}"
            raise BadInput(f"an order of channels names each once; {found} does not")
        super().__init__(edit, edit.new_param(name, order, like=like))
        self.size = len(order)

    def forward(self, x: fx.Node, order: Sequence[int] = ()) -> fx.Node:
        last = x.meta["val"].ndim - 1
        return self.edit.call(aten.index_select.default, x, last, self.source, like=x)


def _orthogonal(value: Tensor) -> Tensor:
    value = _square(value)
    gap = float((value @ value.mT - torch.eye(value.shape[-1], dtype=torch.float64)).abs().max())
    if not gap <= 1e-12:
        raise BadInput(f"an orthogonal matrix is expected; of this one T Tᵀ is off by {gap:.1e}")
    return value


def _invertible(value: Tensor) -> Tensor:
    value = _square(value)
    if not (bool(value.isfinite().all()) and float(torch.linalg.cond(value).max()) < SINGULAR):
        raise BadInput("an invertible matrix is expected; this one is nearly singular")
    return value


def _square(value: Tensor) -> Tensor:
    """`value` in float64, if it is square."""
    if value.ndim < 2 or value.shape[-1] != value.shape[-2]:
        raise BadInput(f"a square matrix is expected; found {list(value.shape)}")
    return value.double()
