"""A program for sizes that are known, and which sizes are worth one.

Of a program for any batch and length nothing is known beforehand, so that nothing can be settled
(`executor.py`). A caller that comes with the same sizes again and again is given a program of its
own, in which they are numbers. Those that vary all the time stay open: in a step of decoding the
past, while one token and the batch come each time.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any, Generic, TypeVar

from torch import SymFloat, SymInt, Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from qcompiler.edit import copy_graph, fake_call
from qcompiler.program import Program
from qcompiler.samples import Flat

REPEATED = 3
"""Calls with the same size, one behind the other, after which a program is made for it: lengths
that come and go never have one."""
KEPT = 4
"""Programs that are kept, with the memory that they work in."""
T = TypeVar("T")
Sizes = tuple[int, ...]
Pattern = tuple[int | None, ...]
"""Sizes, None for those that stay open."""


class Open:
    """The sizes of a program that its inputs decide."""

    def __init__(self, program: Program) -> None:
        self._where: dict[str, tuple[int, int]] = {}
        """Size, as an expression → (input, axis) that tells it."""
        self._symbols: dict[str, frozenset[object]] = {}
        for index, node in enumerate(program.inputs):
            value = node.meta["val"]
            for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                if isinstance(size, SymInt):
                    self._where.setdefault(str(size), (index, axis))
                    self._symbols[str(size)] = symbols(size)

    def __len__(self) -> int:
        return len(self._where)

    def sizes(self, inputs: Flat) -> Sizes:
        """What they are in `inputs`."""
        flat: Any = inputs
        return tuple(flat[i].shape[axis] for i, axis in self._where.values())

    def varying(self, pattern: Pattern) -> frozenset[object]:
        """The symbols of those that `pattern` leaves open."""
        left = (s for s, n in zip(self._symbols.values(), pattern, strict=True) if n is None)
        return frozenset().union(*left)


def symbols(value: object) -> frozenset[object]:
    """What its shape, or the number itself, depends on."""
    found: set[object] = set()
    for leaf in pytree.tree_leaves(value):
        for size in leaf.shape if isinstance(leaf, Tensor) else (leaf,):
            if isinstance(size, SymInt | SymFloat):
                found |= size.node.expr.free_symbols
    return frozenset(found)


def fixed(program: Program, inputs: Flat, varying: frozenset[object] = frozenset()) -> Program:
    """The same with the sizes that `inputs` have, but for what depends on `varying`.

    Every size is found by running the operators on tensors without memory, never by an expression.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graph, _ = copy_graph(program.graph)
    feed = iter(inputs)
    left: dict[fx.Node, object] = {}
    for node in graph.nodes:
        before = node.meta.get("val")
        if node.op == "placeholder":
            name = program.slots.get(node.name)
            value = next(feed) if name is None else program.params[name]
            if isinstance(value, Tensor):
                value = mode.from_tensor(value, static_shapes=True)
            node.meta["val"] = value
        elif node.op == "call_function":
            node.meta["val"] = value = fake_call(node, mode)
            if isinstance(value, int | float) and varying.isdisjoint(symbols(before)):
                _replace(node, value)
        if not varying.isdisjoint(symbols(before)):
            left[node] = before
    for node, value in left.items():
        node.meta["val"] = value
    graph.eliminate_dead_code()
    return replace(program, graph=graph)


def _replace(node: fx.Node, value: float) -> None:
    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg(
            (user.args, user.kwargs), lambda n: value if n is node else n
        )


class Repeated(Generic[T]):
    """What has been made for a few patterns of sizes, and which sizes have come often enough."""

    def __init__(self) -> None:
        self._made: OrderedDict[Pattern, T] = OrderedDict()
        self._last: Sizes = ()
        self._times: list[int] = []

    def get(self, sizes: Sizes) -> T | None:
        """What has been made for `sizes`, with as few left open as there is."""
        fitting = [p for p in self._made if _fits(p, sizes)]
        if not fitting:
            return None
        best = min(fitting, key=lambda p: p.count(None))
        self._made.move_to_end(best)
        return self._made[best]

    def due(self, sizes: Sizes) -> Pattern | None:
        """Note that `sizes` came; those of them to make something for, if it is time."""
        known = zip(self._last, sizes, self._times, strict=False)
        again = [n + 1 if a == b else 1 for a, b, n in known]
        self._last, self._times = sizes, again or [1] * len(sizes)
        # Where one has come twice, the next call may settle more.
        waits = any(1 < n < REPEATED for n in self._times)
        pattern = tuple(s if n > 1 else None for s, n in zip(sizes, self._times, strict=True))
        ready = not waits and any(n is not None for n in pattern)
        return pattern if ready and pattern not in self._made else None

    def put(self, pattern: Pattern, value: T) -> None:
        """Keep it; what has not been used for longest goes."""
        self._made[pattern] = value
        if len(self._made) > KEPT:
            self._made.popitem(last=False)


def _fits(pattern: Pattern, sizes: Sizes) -> bool:
    return all(a is None or a == b for a, b in zip(pattern, sizes, strict=True))
