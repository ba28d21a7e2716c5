"""The fake value of each node: shape and type without arithmetic, dynamic dimensions as symbols."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from qcompiler.edit import fake_call
from qcompiler.io import Port
from qcompiler.program import Program

PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)


def propagate(program: Program) -> None:
    """Compute them anew, one symbol for each dimension that the signature names; if that fails, all
    stay as they are."""
    was = [(node, node.meta.get("val")) for node in program.graph.nodes]
    try:
        _propagate(program)
    except Exception:  # whatever it is, it goes on from here
        for node, value in was:
            node.meta["val"] = value
        raise


def _propagate(program: Program) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    sizes = {d: _symbol(i, mode) for i, d in enumerate(program.io.dims)}
    sizes |= {d: sizes[d] * step for d, step in program.io.steps.items()}
    feed = iter(program.io.ports)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = program.slots.get(node.name)
            if name is not None:
                node.meta["val"] = mode.from_tensor(program.params[name], static_shapes=True)
            else:
                node.meta["val"] = _fake_input(next(feed), sizes, mode)
        elif node.op == "call_function":
            node.meta["val"] = fake_call(node, mode)


def _symbol(number: int, mode: FakeTensorMode) -> torch.SymInt:
    # Equal sizes become one symbol ("duck shaping"), so each dimension gets its own.
    size = (*PRIMES, *range(101, 101 + number))[number]
    context: StatelessSymbolicContext = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK])  # type: ignore
    symbol: torch.SymInt = mode.from_tensor(torch.empty(size), symbolic_context=context).shape[0]  # type: ignore[assignment]
    return symbol


def _fake_input(port: Port, sizes: Mapping[str, torch.SymInt], mode: FakeTensorMode) -> object:
    if not port.is_tensor:
        return port.constant
    shape = [sizes[d] if isinstance(d, str) else d for d in port.shape]
    with mode:
        return torch.empty(shape, dtype=port.dtype)
