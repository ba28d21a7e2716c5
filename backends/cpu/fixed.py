"""A program for inputs of one shape each, and which shapes are worth one.

Of a program for any batch and length nothing is known beforehand, so that nothing can be settled
(`executor.py`). A caller that comes with the same shapes again and again is given a program of its
own, whose sizes are numbers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace
from typing import Generic, TypeVar

from torch import SymInt, Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompiler.edit import copy_graph, fake_call
from qcompiler.program import Program
from qcompiler.samples import Flat

REPEATED = 3
"""Calls with the same shapes, one behind the other, after which a program is made for them: lengths
that come and go, and a cache that grows, never have one."""
KEPT = 4
"""Programs that are kept, with the memory that they work in."""
T = TypeVar("T")


def shapes(inputs: Flat) -> Hashable:
    """All that sizes in a program depend on."""
    return tuple(tuple(x.shape) if isinstance(x, Tensor) else x for x in inputs)


def varies(program: Program) -> bool:
    """Whether it takes inputs of several shapes."""
    values = [node.meta["val"] for node in program.inputs]
    return any(isinstance(n, SymInt) for v in values if isinstance(v, Tensor) for n in v.shape)


def fixed(program: Program, inputs: Flat) -> Program:
    """The same for inputs of the shapes of `inputs`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graph, _ = copy_graph(program.graph)
    feed = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            name = program.slots.get(node.name)
            value = next(feed) if name is None else program.params[name]
            if isinstance(value, Tensor):
                value = mode.from_tensor(value, static_shapes=True)
            node.meta["val"] = value
        elif node.op == "call_function":
            node.meta["val"] = value = fake_call(node, mode)
            if isinstance(value, int | float):
                _replace(node, value)
    graph.eliminate_dead_code()
    return replace(program, graph=graph)


def _replace(node: fx.Node, value: float) -> None:
    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg(
            (user.args, user.kwargs), lambda n: value if n is node else n
        )


class Repeated(Generic[T]):
    """What has been made for a few keys, and which key has come often enough."""

    def __init__(self) -> None:
        self._made: OrderedDict[Hashable, T] = OrderedDict()
        self._last: Hashable = None
        self._count = 0

    def get(self, key: Hashable) -> T | None:
        """What has been made for `key`."""
        if key in self._made:
            self._made.move_to_end(key)
        return self._made.get(key)

    def due(self, key: Hashable) -> bool:
        """Note that `key` came and had nothing; whether something is to be made for it."""
        self._count = self._count + 1 if key == self._last else 1
        self._last = key
        return self._count == REPEATED

    def put(self, key: Hashable, value: T) -> None:
        """Keep it; what has not been used for longest goes."""
        self._made[key] = value
        if len(self._made) > KEPT:
            self._made.popitem(last=False)
