"""Which dimensions of a program's inputs are dynamic: those that torch.export leaves free and at
which the program was seen to run; which of them are one, and within what bounds.

torch.export proves shapes only where its shape functions check them: the channels of a convolution,
two batches that meet behind a view, or a table of positions are seen when the program runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import TypeGuard

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler.capture.against import Judge, sizes_of
from qcompiler.errors import first_line
from qcompiler.io import Dim, Signature
from qcompiler.program import Program
from qcompiler.samples import Flat, drawn_sizes, random_inputs, within
from qcompiler.shapes import propagate

STEPS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 64, 128)
"""What the size of a dimension is tried to be a multiple of."""

SMALL = 64
"""Below it a size is also tried at three times as much."""
FEW = 8
"""The same of a batch: three times as many images would take minutes."""


Axes = frozenset[tuple[int, int]]
"""(flat input, axis) of some dimensions."""


def dynamic_shapes(call: object, fixed: Axes, turned: bool) -> tuple[object, object]:
    """torch.export's dynamic shapes for `(args, kwargs)`, without those that are `fixed`;
    `turned`: of sequences that have their channels first."""
    values, spec = pytree.tree_flatten(call)
    wanted: list[object] = []
    for i, (x, named) in enumerate(zip(values, wanted_axes(call, fixed, turned), strict=True)):
        axes = set(named)
        if isinstance(x, Tensor) and _is_square(x, values[:i] + values[i + 1 :], turned):
            axes |= {a for a in (x.ndim - 2, x.ndim - 1) if (i, a) not in fixed}
        dims = dict.fromkeys(sorted(axes), torch.export.Dim.AUTO)
        wanted.append(dims if isinstance(x, Tensor) else None)
    return pytree.tree_unflatten(wanted, spec)  # type: ignore[no-any-return]


def wanted_axes(call: object, fixed: Axes, turned: bool) -> list[dict[int, str]]:
    """The names of the axes that should be dynamic."""
    return [
        {
            axis: "sequence" if axis else "batch"
            for axis in (_axes(x, turned) if isinstance(x, Tensor) else ())
            if (i, axis) not in fixed
        }
        for i, x in enumerate(pytree.tree_leaves(call))
    ]


def _is_square(x: Tensor, others: list[object], turned: bool) -> bool:
    """Whether `x` may be a mask, (…, sequence, sequence), of another input's sequence."""
    lengths = {y.shape[a] for y in others if isinstance(y, Tensor) for a in _axes(y, turned) if a}
    return x.ndim > 1 and x.shape[-1] == x.shape[-2] and x.shape[-1] in lengths


def axes_of(program: Program, dims: Collection[str]) -> Axes:
    """Where dimensions with these names are."""
    ports = enumerate(program.io.ports)
    return frozenset((i, axis) for i, p in ports for axis, d in enumerate(p.shape) if d in dims)


def noted(program: Program, wanted: Sequence[Mapping[int, str]]) -> Program:
    """`program` with notes of the axes that were to be dynamic, under these names, and are numbers
    in the graph."""
    notes = [
        f"{name} stays {port.shape[axis]} (axis {axis} of {port.name}): what the model computes "
        "makes a number of it"
        for port, axes in zip(program.io.ports, wanted, strict=True)
        for axis, name in axes.items()
        if port.is_tensor and isinstance(port.shape[axis], int)
    ]
    return _with_notes(program, notes)


def _with_notes(program: Program, notes: Iterable[str]) -> Program:
    first, *rest = program.history
    history = (replace(first, notes=(*first.notes, *notes)), *rest)
    return replace(program, history=history)


def two_or_more(x: Tensor, turned: bool) -> Tensor:
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


def stuck_dims(program: Program, example: Flat, judge: Judge | None = None) -> dict[str, str]:
    """Dimension → why it is not dynamic after all: the program fails at other sizes, or `judge`
    says that what it computes there is wrong."""
    own = sizes_of(program, example)
    found: dict[str, str] = {}
    for seed in (1, 2):
        sizes = drawn_sizes(program.io, seed)
        why = "at {} the program fails, {}"
        found |= _blamed(program, own, sizes, partial(_failure, program), why)
    if found or judge is None or not own:  # what fails is captured again, and judged then
        return found
    wrong = partial(_wrong, program, judge)
    tried = ((sizes, wrong(sizes)) for sizes in _others(program, own))
    sizes, text = next(((s, text) for s, text in tried if text is not None), (own, ""))
    if not text or wrong(own):  # what differs at the example's own sizes is not their fault
        return {}
    why = "a number that is computed from it is baked in: at {}, {}"
    return _blamed(program, own, sizes, lambda s: wrong(s) or "", why)


def _blamed(
    program: Program,
    own: Mapping[str, int],
    sizes: Mapping[str, int],
    failure: Callable[[dict[str, int]], str],
    why: str,
) -> dict[str, str]:
    """Dimensions whose `sizes` are the reason for a failure at all of them."""
    if not own or not (together := failure(dict(sizes))):
        return {}
    alone = {dim: failure({**own, dim: sizes[dim]}) for dim in own}
    # Where each goes alone, they do not go together.
    texts = alone if any(alone.values()) else dict.fromkeys(own, together)
    return {
        dim: f"{dim} stays {own[dim]} ({_where(program, dim)}): {why.format(sizes[dim], text)}"
        for dim, text in texts.items()
        if text
    }


def _where(program: Program, dim: str) -> str:
    """The first place of a dimension, as `axis 1 of x`."""
    port = next(p for p in program.io.ports if dim in p.shape)
    return f"axis {port.shape.index(dim)} of {port.name}"


def _others(program: Program, own: Mapping[str, int]) -> Iterable[dict[str, int]]:
    """Sizes that a number which is computed from the example's does not fit."""
    small = drawn_sizes(program.io, 1)
    # `int(0.1 * size)` is 1 from 10 to 19: small sizes are tried far from where they are.
    bases = {d: own.get(d.rstrip("0123456789"), n) for d, n in own.items()}
    far = {
        d: 3 * n + 1 if n < (FEW if d.startswith("batch") else SMALL) else small[d]
        for d, n in bases.items()
    }
    io = program.io
    far = {d: within(n, *io.dims[d], io.steps.get(d, 1)) for d, n in far.items()}
    # At the end of its bounds a size is tried below them.
    far = {d: small[d] if n == own[d] else n for d, n in far.items()}
    return far, small, drawn_sizes(io, 2)


def _wrong(program: Program, judge: Judge, sizes: dict[str, int]) -> str | None:
    """What `judge` says of a run at these sizes; None if it fails."""
    inputs = random_inputs(program.io, 1, sizes)
    try:
        outputs = program.flat(inputs)
    except Exception:  # whatever an operator raises
        return None
    return judge(program, inputs, outputs)


def fixed(program: Program, example: Flat, stuck: Mapping[str, str]) -> Program:
    """`program` whose `stuck` dimensions have the example's sizes, for a graph that cannot be
    captured again; the reasons become notes."""
    own: dict[Dim, Dim] = {d: n for d, n in sizes_of(program, example).items() if d in stuck}
    ports = (replace(p, shape=tuple(own.get(d, d) for d in p.shape)) for p in program.io.ports)
    dims = {d: bounds for d, bounds in program.io.dims.items() if d not in own}
    steps = {d: step for d, step in program.io.steps.items() if d not in own}
    io = replace(program.io, ports=tuple(ports), dims=dims, steps=steps)
    made = _with_notes(replace(program, io=io), stuck.values())
    with suppress(Exception):  # shapes as symbols are right too
        propagate(made)
    return made


def settled(program: Program, example: Flat) -> Program:
    """`program` with one name for dimensions that must have one size, with what sizes must be a
    multiple of, and with bounds: as runs at other sizes than the example's tell."""
    own = sizes_of(program, example)
    named = made = _renamed(program, _one(program, own))
    if own and _fails(made):
        made = replace(made, io=_bounded(made, sizes_of(made, example)))
    for found in (made, named):
        if found is program or _fails(found):  # what still fails is captured again
            return found
        try:
            propagate(found)
        except Exception:  # shapes that hold at each size that was tried, and not as symbols
            continue
        return found
    return program


def _fails(program: Program) -> bool:
    return any(_failure(program, drawn_sizes(program.io, seed)) for seed in (1, 2))


def _one(program: Program, own: Mapping[str, int]) -> dict[str, str]:
    """Dimension → the one that it must be as large as: a mask's batch is that of the tokens.

    Those that may be one are called alike, `batch` and `batch2`, and are in the example.
    """
    bases = {d: d.rstrip("0123456789") for d in own}
    one: dict[str, str] = {}
    for base in dict.fromkeys(b for d, b in bases.items() if d != b and b in own):
        family = [d for d in own if bases[d] == base and own[d] == own[base]]
        # A size of 1 would fit any other; one below the example's is to be larger than that.
        larger = {**own, **dict.fromkeys(family, own[base] + 2)}
        start = own if _failure(program, larger) else larger

        sizes = start[base] + 1, max(start[base] - 1, 2)
        runs = partial(_runs, program, start, sizes)

        # A mask of more rows than there are texts may run, the rest unseen: of a batch, one
        # direction that fails is enough. A sequence may well be the longer one.
        enough = all if base == "batch" else any
        tied = [d for d in family if not enough(runs([d]))]
        for first, second in combinations(tied, 2):
            if second not in one and all(runs([first, second])):
                one[second] = one.get(first, first)
        left = [d for d in tied if d not in {*one, *one.values()}]
        if len(left) > 2 and all(runs(left)):
            one |= dict.fromkeys(left[1:], left[0])
    return one


def _runs(
    program: Program, own: Mapping[str, int], sizes: Iterable[int], dims: Iterable[str]
) -> list[bool]:
    """Whether the program runs with each size for `dims`, all others as they are."""
    return [not _failure(program, {**own, **dict.fromkeys(dims, n)}) for n in sizes]


def _bounded(program: Program, own: Mapping[str, int]) -> Signature:
    """The signature with the steps and bounds of dimensions that fail at other sizes: the height of
    an image that is halved twice and put together again, positions that a table has."""
    dims, steps = dict(program.io.dims), {}
    drawn = [drawn_sizes(program.io, seed) for seed in (1, 2)]

    def runs(dim: str, size: int) -> bool:
        return size > 0 and not _failure(program, {**own, dim: size})

    for dim, size in own.items():
        if all(runs(dim, sizes[dim]) for sizes in drawn):
            continue
        step = 1
        if not (runs(dim, size + 1) or runs(dim, size - 1)):
            tried = (k for k in STEPS if size % k == 0 and size > k)
            step = next((k for k in tried if runs(dim, size + k) and runs(dim, size - k)), 0)
        if step == 0:
            continue
        if step > 1:
            steps[dim] = step
        low, high = dims[dim]
        for wanted in {sizes[dim] // step * step or step for sizes in drawn}:
            if runs(dim, wanted):
                continue
            right, wrong = size, wanted  # the bound lies between
            while abs(right - wrong) > step:
                middle = (right + wrong) // (2 * step) * step
                right, wrong = (middle, wrong) if runs(dim, middle) else (right, middle)
            low, high = (max(low, right), high) if wrong < right else (low, right)
        dims[dim] = low, high
    return replace(program.io, dims=dims, steps=steps)


def _renamed(program: Program, one: Mapping[str, str]) -> Program:
    """`program` with other names for some dimensions, those of others."""
    if not one:
        return program
    bounds = dict(program.io.dims)
    for d, base in one.items():
        (low, high), (other, upper) = bounds[base], bounds.pop(d)
        highest = [h for h in (high, upper) if h is not None]
        bounds[base] = max(low, other), min(highest, default=None)
    ports = (
        replace(p, shape=tuple(one.get(d, d) if isinstance(d, str) else d for d in p.shape))
        for p in program.io.ports
    )
    return replace(program, io=replace(program.io, ports=tuple(ports), dims=bounds))


def _failure(program: Program, sizes: dict[str, int]) -> str:
    try:
        program.flat(random_inputs(program.io, 1, sizes))
    except Exception as error:  # whatever an operator raises at a size that it does not take
        return f"{type(error).__name__}: {first_line(error)}"
    return ""
