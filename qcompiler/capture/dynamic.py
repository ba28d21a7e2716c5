"""Which dimensions of a module's inputs are dynamic: those that torch.export leaves free and at
which the program was seen to run."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler.program import Program
from qcompiler.samples import Flat, drawn_sizes, random_inputs


def dynamic_shapes(
    call: object, program: Program | None = None, stuck: Collection[str] = ()
) -> tuple[object, object]:
    """torch.export's dynamic shapes for `(args, kwargs)`, without the dimensions in `stuck`."""
    flat, spec = pytree.tree_flatten(call)
    names = [p.shape for p in program.io.ports] if program else [()] * len(flat)
    wanted = [
        {
            axis: torch.export.Dim.AUTO
            for axis in _axes(x)
            if not (axis < len(shape) and shape[axis] in stuck)
        }
        if isinstance(x, Tensor)
        else None
        for x, shape in zip(flat, names, strict=True)
    ]
    return pytree.tree_unflatten(wanted, spec)  # type: ignore[no-any-return]


def two_or_more(x: Tensor) -> Tensor:
    """Repeat axes of size 1 that should be dynamic: torch.export bakes sizes 0 and 1 in."""
    for axis in _axes(x):
        if x.shape[axis] == 1:
            x = torch.cat([x, x], axis)
    return x


def _axes(x: Tensor) -> tuple[int, ...]:
    """Batch, and the sequence of token ids, masks (2-D) and embedded sequences (3-D)."""
    tokens = x.ndim == 2 and not x.is_floating_point()
    return (0, 1) if tokens or x.ndim == 3 else (0,) if x.ndim else ()


def stuck_dims(program: Program, example: Flat) -> dict[str, str]:
    """Dimension → why it is not dynamic after all.

    torch.export proves shapes only where its shape functions check them: the channels of a
    convolution, or a table of positions behind one, are seen when the program runs.
    """
    own = {
        dim: x.shape[axis]
        for port, x in zip(program.io.ports, example, strict=True)
        if isinstance(x, Tensor)
        for axis, dim in enumerate(port.shape)
        if isinstance(dim, str)
    }
    found: dict[str, str] = {}
    for seed in (1, 2):
        sizes = drawn_sizes(program.io, seed)
        if not own or not (together := _failure(program, sizes)):
            continue
        alone = {dim: _failure(program, {**own, dim: sizes[dim]}) for dim in own}
        for dim in own:  # where each goes alone, they do not go together
            if why := alone[dim] if any(alone.values()) else together:
                found[dim] = f"{dim} stays {own[dim]}: at {sizes[dim]} the program fails, {why}"
    return found


def _failure(program: Program, sizes: dict[str, int]) -> str:
    try:
        program.flat(random_inputs(program.io, 1, sizes))
    except (RuntimeError, IndexError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""
