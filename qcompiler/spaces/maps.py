"""How a map acts on channels: the operators that it is in a program.

A value with its channels on the last axis, x, becomes x Tᵀ; whoever reads it gets W T⁻¹. Both are
ordinary operators on the map's own parameter, which thereby stays one thing: a later pass may train
it, and `fold` evaluates it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.hadamard import hadamard
from qcompiler.spaces.system import Space

aten = torch.ops.aten
SINGULAR = 1e6
"""A matrix with a larger condition number loses too many digits to its inverse."""


class Map(ABC):
    """T, and what it takes to apply it along the last axis."""

    maps: tuple[int, ...] = ()
    """Sizes of the leading axes of a map that differs by index (per head)."""
    wide = True
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

    def __init__(self, edit: Edit, space: Space, value: Tensor, name: str) -> None:
        value = _checked(space, value)
        super().__init__(edit, edit.new_param(name, value, like=space.home))
        self.maps = tuple(value.shape[:-2])
        self._orthogonal = space.kind == "orthogonal"
        edit.free(self.source, space.kind)

    def forward(self, x: fx.Node, order: Sequence[int] = ()) -> fx.Node:
        return self._times(x, self._turned(self.source, order, x), x)

    def backward(self, x: fx.Node, order: Sequence[int] = ()) -> fx.Node:
        if self._orthogonal:
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
    """R = H diag(±1) / √n as a fast transform: n log n instead of n² (see `qc::hadamard`)."""

    def __init__(self, edit: Edit, space: Space, signs: Tensor, name: str) -> None:
        if tuple(signs.shape) != (space.size,) or not bool((signs.abs() == 1).all()):
            raise BadInput(f"space {space.id} takes {space.size} signs; found {list(signs.shape)}")
        super().__init__(edit, edit.new_param(name, signs, like=space.home))

    def forward(self, x: fx.Node, order: Sequence[int] = ()) -> fx.Node:
        signs = self.source
        if signs.meta["val"].dtype != x.meta["val"].dtype:
            signs = self.edit.call(aten.to.dtype, signs, x.meta["val"].dtype, like=x)
        signed = self.edit.call(aten.mul.Tensor, x, signs, like=x)
        return self.edit.call(torch.ops.qc.hadamard.default, signed, like=x)


class Kronecker(Map):
    """T = A ⊗ B: n = n₁ n₂ channels by two small matrices (FlatQuant, Sun et al. 2024, eq. 4)."""

    def __init__(self, edit: Edit, space: Space, left: Tensor, right: Tensor, name: str) -> None:
        if len(left) * len(right) != space.size:
            raise BadInput(
                f"space {space.id} takes factors of {space.size} channels; found {len(left)} × "
                f"{len(right)}"
            )
        first, second = _invertible(space, left.double()), _invertible(space, right.double())
        like = space.home
        super().__init__(edit, edit.new_param(f"{name}.left", first, like=like))
        self._right = edit.new_param(f"{name}.right", second, like=like)
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
        mixed = edit.call(aten.matmul.default, folded, right, like=x)
        mixed = edit.call(aten.matmul.default, left, mixed, like=x)
        return edit.call(aten.flatten.using_ints, mixed, len(shape) - 1, -1, like=x)


class Order(Map):
    """Channel i becomes what channel order[i] was."""

    wide = False

    def __init__(self, edit: Edit, space: Space, order: Tensor, name: str) -> None:
        if not torch.equal(order.sort().values, torch.arange(space.size)):
            raise BadInput(
                f"space {space.id} takes an order of {space.size} channels; found {order.tolist()}"
                if order.numel() <= 16
                else f"space {space.id} takes an order of {space.size} channels; some are missing"
            )
        super().__init__(edit, edit.new_param(name, order, like=space.home))

    def forward(self, x: fx.Node, order: Sequence[int] = ()) -> fx.Node:
        last = x.meta["val"].ndim - 1
        return self.edit.call(aten.index_select.default, x, last, self.source, like=x)


def fast_hadamard(size: int) -> bool:
    """Whether a Hadamard matrix of this size can be constructed."""
    return hadamard(size) is not None


def _checked(space: Space, value: Tensor) -> Tensor:
    """`value` in float64 if it is a map of the space's kind, shared or one per index."""
    square = (space.size, space.size)
    if tuple(value.shape) not in (square, (*space.maps, *square)):
        each = f", or one for each of {list(space.maps)}" if space.maps else ""
        raise BadInput(
            f"space {space.id} takes a {space.size} × {space.size} matrix{each}; "
            f"found {list(value.shape)}"
        )
    return _invertible(space, value.double())


def _invertible(space: Space, value: Tensor) -> Tensor:
    identity = torch.eye(value.shape[-1], dtype=torch.float64)
    gap = float((value @ value.transpose(-2, -1) - identity).abs().max())
    if space.kind == "orthogonal" and not gap <= 1e-12:
        raise BadInput(f"space {space.id} takes an orthogonal matrix; T Tᵀ is off by {gap:.1e}")
    if not (bool(value.isfinite().all()) and float(torch.linalg.cond(value).max()) < SINGULAR):
        raise BadInput(f"space {space.id} takes an invertible matrix; this one is nearly singular")
    return value
