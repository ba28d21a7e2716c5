"""Which dimensions of a program's inputs are dynamic: those that torch.export leaves free and at
which the program was seen to run; and which of them are one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TypeGuard

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler.errors import first_line
from qcompiler.program import Program
from qcompiler.samples import Flat, drawn_sizes, random_inputs
from qcompiler.shapes import propagate

STEPS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 24, 32, 64, 128)
"""What the size of a dimension is tried to be a multiple of."""


def dynamic_shapes(
    call: object,
    program: Program | None = None,
    stuck: Collection[str] = (),
    turned: bool = False,
) -> tuple[object, object]:
    """torch.export's dynamic shapes for `(args, kwargs)`, without the dimensions in `stuck`;
    `turned`: of sequences that have their channels first."""
    flat, spec = pytree.tree_flatten(call)
    names = [p.shape for p in program.io.ports] if program else [()] * len(flat)
    wanted = [
        {
            axis: torch.export.Dim.AUTO
            for axis in _axes(x, turned)
            if not (axis < len(shape) and shape[axis] in stuck)
        }
        if isinstance(x, Tensor)
        else None
        for x, shape in zip(flat, names, strict=True)
    ]
    return pytree.tree_unflatten(wanted, spec)  # type: ignore[no-any-return]


def two_or_more(x: Tensor, turned: bool = False) -> Tensor:
    """Repeat axes of size 1 that should be dynamic: torch.export bakes sizes 0 and 1 in."""
    for axis in _axes(x, turned):
        if x.shape[axis] == 1:
            x = torch.cat([x, x], axis)
    return x


def is_sequence(x: object) -> TypeGuard[Tensor]:
    """Whether `x` may be a batch of sequences of vectors."""
    return isinstance(x, Tensor) and x.ndim == 3 and x.is_floating_point()


def _axes(x: Tensor, turned: bool) -> tuple[int, ...]:
    """Batch, and the sequence of token ids, masks (2-D) and embedded sequences (3-D)."""
    if turned and is_sequence(x):
        return (0, 2)
    tokens = x.ndim == 2 and not x.is_floating_point()
    return (0, 1) if tokens or x.ndim == 3 else (0,) if x.ndim else ()


def stuck_dims(program: Program, example: Flat) -> dict[str, str]:
    """Dimension → why it is not dynamic after all.

    torch.export proves shapes only where its shape functions check them: the channels of a
    convolution, or a table of positions behind one, are seen when the program runs.
    """
    own = _sizes(program, example)
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


def stepped(program: Program, example: Flat) -> Program:
    """`program` with what some sizes must be a multiple of: the height of an image that is halved
    twice and put together again, say. As runs tell."""
    own, drawn = _sizes(program, example), drawn_sizes(program.io, 1)
    found: dict[str, int] = {}
    if not own or not _failure(program, drawn):
        return program

    def runs(dim: str, size: int) -> bool:
        return not _failure(program, {**own, dim: size})

    for dim, size in own.items():
        if not runs(dim, drawn[dim]):
            steps = (k for k in STEPS if size % k == 0 and size > k)
            step = next((k for k in steps if runs(dim, size + k) and runs(dim, size - k)), None)
            found |= {dim: step} if step else {}
    if not found:
        return program
    program = replace(program, io=replace(program.io, steps=found))
    if not _failure(program, drawn_sizes(program.io, 1)):  # else it is captured again
        propagate(program)
    return program


def joined(program: Program, example: Flat) -> Program:
    """`program` with one name for dimensions that must have one size: a mask's batch and that of
    the tokens. torch.export proves some of that; of others runs at other sizes tell.

    Dimensions that may be one are called alike: `batch`, `batch2`.
    """
    own = _sizes(program, example)
    bases = {d: d.rstrip("0123456789") for d in own}
    alike = {d: b for d, b in bases.items() if d != b and own.get(b) == own[d]}
    one: dict[str, str] = {}
    for base in dict.fromkeys(alike.values()):
        size = drawn_sizes(program.io, 1)[base]
        size += size == own[base]

        def runs(dims: Iterable[str], own: Mapping[str, int] = own, size: int = size) -> bool:
            return not _failure(program, {**own, **dict.fromkeys(dims, size)})

        family = {base, *(d for d in alike if alike[d] == base)}
        # A mask of more rows than there are texts may go unseen, one of fewer does not.
        tied = [d for d in family - {base} if not (runs([d]) and runs(family - {d}))]
        if not runs([base, *tied]):
            tied = [d for d in tied if runs([base, d])]
        one |= dict.fromkeys(tied, base)
    return _renamed(program, one) if one else program


def _renamed(program: Program, one: Mapping[str, str]) -> Program:
    """`program` with other names for some dimensions, those of others."""
    bounds = dict(program.io.dims)
    for d, base in one.items():
        (low, high), (other, upper) = bounds[base], bounds.pop(d)
        highest = [h for h in (high, upper) if h is not None]
        bounds[base] = max(low, other), min(highest, default=None)
    ports = (
        replace(p, shape=tuple(one.get(d, d) if isinstance(d, str) else d for d in p.shape))
        for p in program.io.ports
    )
    program = replace(program, io=replace(program.io, ports=tuple(ports), dims=bounds))
    if not _failure(program, drawn_sizes(program.io, 1)):  # else it is captured again
        propagate(program)
    return program


def _sizes(program: Program, example: Flat) -> dict[str, int]:
    """The size of each dynamic dimension in an example."""
    return {
        dim: x.shape[axis]
        for port, x in zip(program.io.ports, example, strict=False)
        if isinstance(x, Tensor)
        for axis, dim in enumerate(port.shape)
        if isinstance(dim, str)
    }


def _failure(program: Program, sizes: dict[str, int]) -> str:
    try:
        program.flat(random_inputs(program.io, 1, sizes))
    except Exception as error:  # whatever an operator raises at a size that it does not take
        return f"{type(error).__name__}: {first_line(error)}"
    return ""
