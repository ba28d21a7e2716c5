"""What a program carries from one call to the next: inputs that come back longer.

    output = cat([input, new], axis)        keys and values of attention, for one

They are found in the graph. Before the first call there is nothing to carry: such an input may be
empty along that axis, which `torch.export` would not say (it takes sizes for 2 or more).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from qcompiler.append import append
from qcompiler.edit import copy_graph
from qcompiler.io import Port
from qcompiler.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class State:
    """An input that grows into an output."""

    path: tuple[fx.Node, ...]
    """The input, what is made of it by appending, and the last of these, which is an output."""
    axis: int
    """Not negative."""

    @property
    def input(self) -> fx.Node:
        """Where it begins."""
        return self.path[0]


def states(program: Program) -> Iterator[State]:
    """Each output that is an input with something appended to it."""
    inputs = set(program.inputs)
    for output in program.graph.output_node().all_input_nodes:
        axis, path = _axis(output), [output]
        while axis is not None and _axis(path[-1]) == axis:
            parts: Any = path[-1].args[0]
            path.append(next((n for n in parts if n in inputs or _axis(n) == axis), parts[0]))
        if path[-1] in inputs and axis is not None:
            yield State(tuple(reversed(path)), axis)


def begins_empty(state: State, program: Program) -> bool:
    """Whether there may be nothing of it yet."""
    size = _ports(program)[state.input].shape[state.axis]
    return isinstance(size, str) and program.io.dims[size][0] == 0


def appended(state: State, program: Program) -> tuple[fx.Node, fx.Node] | str | None:
    """The input and what is appended to it, or what kernels that append in place would have
    instead; None where nothing grows from nothing (an input joined with what comes from outside).
    """
    if not begins_empty(state, program):
        return None
    parts: Any = state.path[-1].args[0]
    if len(state.path) > 2 or len(parts) != 2 or parts[0] is not state.input:
        return "takes an input with one thing appended to it"
    if len({n.meta["val"].dtype for n in (*parts, state.path[-1])}) > 1:
        return "takes what is of the input's own type"
    return parts[0], parts[1]


def growing(program: Program) -> Program:
    """The program, to be run, with states that grow in place (`append.py`)."""
    graph, copies = copy_graph(program.graph)
    for state in states(program):
        joined: Any = state.path[-1].args[0]
        if len(state.path) == 2 and len(joined) == 2 and begins_empty(state, program):
            made = copies[state.path[-1]]
            made.target, made.kwargs = append, {}
            made.args = (*(copies[n] for n in joined), state.axis)
    return replace(program, graph=graph)


def _axis(node: fx.Node) -> int | None:
    """The axis along which it joins tensors, if it does."""
    if node.target is not aten.cat.default:
        return None
    axis: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    ndim: int = node.meta["val"].ndim
    return int(axis) % ndim


def begin_empty(program: Program) -> Program:
    """The smallest size of each dimension along which nothing but states lie becomes 0."""
    io = program.io
    ports = _ports(program)
    axes = {ports[s.input].name: s.axis for s in states(program) if _only_appended(s)}
    found = {
        dim
        for port in io.tensors
        if port.name in axes and isinstance(dim := port.shape[axes[port.name]], str)
    }
    elsewhere = {dim for p in io.tensors for i, dim in enumerate(p.shape) if axes.get(p.name) != i}
    dims = dict(io.dims) | {d: (0, io.dims[d][1]) for d in found - elsewhere}
    return replace(program, io=replace(io, dims=dims))


def _ports(program: Program) -> dict[fx.Node, Port]:
    """By input: nodes may be called otherwise than what a caller hands over."""
    return dict(zip(program.inputs, program.io.ports, strict=True))


def _only_appended(state: State) -> bool:
    """Whether its values are read nowhere else: there, nothing might not be welcome."""
    return all(
        user in state.path or user.target is aten.sym_size.int
        for node in state.path[:-1]
        for user in node.users
    )
