"""Running a graph node by node: in float64 for checks, and with a look at values for facts.

Values are freed behind their last reader, so the peak is what the graph itself keeps alive.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Reversible

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from qcompiler.program import Program, node_id

Call = Callable[[fx.Node, tuple[object, ...], dict[str, object]], object]
Watch = Callable[[fx.Node, object], None]
Instead = Callable[[fx.Node, Callable[[], object]], object]
"""Gives the value of a node, with what would compute it at hand."""


def evaluate(
    program: Program, inputs: tuple[object, ...], watch: Watch | None = None
) -> tuple[object, ...]:
    """Flat outputs for flat inputs, in the program's own types; `watch` sees each node's value."""
    return _interpret(program, inputs, _call, watch)


def evaluate_wide(
    program: Program,
    inputs: tuple[object, ...],
    watch: Watch | None = None,
    dtype: torch.dtype = torch.float64,
    instead: Instead | None = None,
) -> tuple[object, ...]:
    """Like `evaluate`, with all narrower floating point arithmetic in `dtype`, casts included.

    Parameters are widened when they are read and dropped again, so that the extra memory is one
    weight, whatever the size of the model.
    """

    def call(node: fx.Node, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if instead is None:
            return _call_wide(node, args, kwargs, dtype)
        return instead(node, lambda: _call_wide(node, args, kwargs, dtype))

    return _interpret(program, tuple(widen(x, dtype) for x in inputs), call, watch)


def widen(value: object, dtype: torch.dtype = torch.float64) -> object:
    """Floating point and complex tensors and types that are narrower to `dtype`, or to pairs of
    it; everything else as it is."""
    if isinstance(value, Tensor):
        return value.to(_wide(value.dtype, dtype))
    if isinstance(value, torch.dtype):
        return _wide(value, dtype)
    return value


def _wide(narrow: torch.dtype, wide: torch.dtype) -> torch.dtype:
    wide = wide.to_complex() if narrow.is_complex else wide
    arithmetic = narrow.is_floating_point or narrow.is_complex
    return wide if arithmetic and narrow.itemsize < wide.itemsize else narrow


def param_value(program: Program, node: fx.Node) -> Tensor | None:
    """Value in float64 of an expression of parameters only; None if it reads an input."""
    if node.op == "placeholder":
        name = program.slots.get(node.name)
        return None if name is None else widen(program.params[name])  # type: ignore[return-value]
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    values = {n: param_value(program, n) for n in node.all_input_nodes}
    if any(v is None for v in values.values()):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    result = _call_wide(node, args, kwargs)
    return result if isinstance(result, Tensor) else None


def _call(node: fx.Node, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _call_wide(
    node: fx.Node,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    dtype: torch.dtype = torch.float64,
) -> object:
    args, kwargs = pytree.tree_map(lambda v: widen(v, dtype), (args, kwargs))
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    return pytree.tree_map(lambda v: widen(v, dtype), result)


def _interpret(
    program: Program, inputs: tuple[object, ...], call: Call, watch: Watch | None
) -> tuple[object, ...]:
    feed = iter(inputs)
    values: dict[fx.Node, object] = {}
    last = last_readers(program.graph.nodes)
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "output":
                return tuple(fx.node.map_arg(node.args[0], lambda n: values[n]))
            if node.op == "placeholder":
                name = program.slots.get(node.name)
                values[node] = next(feed) if name is None else program.params[name]
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = call(node, args, kwargs)
            if watch is not None:
                watch(node, values[node])
            for done in last.get(node, ()):
                del values[done]
    raise AssertionError("a graph ends with its output node")


def last_readers(
    nodes: Reversible[fx.Node], alive: Collection[fx.Node] = ()
) -> Mapping[fx.Node, list[fx.Node]]:
    """Node → values that nobody reads after it: neither inputs, which others hold, nor `alive`."""
    seen = set(alive)
    last: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(nodes):
        for value in (node, *node.all_input_nodes):
            if value not in seen and value.op != "placeholder":
                last.setdefault(node, []).append(value)
            seen.add(value)
    return last


def watch_ids(ids: Collection[str], into: dict[str, object]) -> Watch:
    """A watcher that keeps the values of the nodes called `ids`."""

    def watch(node: fx.Node, value: object) -> None:
        if node_id(node) in ids:
            into[node_id(node)] = value

    return watch
