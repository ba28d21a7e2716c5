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


def propagate(program: Program) -> None:
    """Compute them anew, one symbol for each dimension that the signature names."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    # Equal sizes become one symbol ("duck shaping"), so each named dimension gets its own size.
    primes = (5, 7, 11, 13, 17, 19, 23, 29)
    sizes = {d: primes[i % 8] for i, d in enumerate(program.io.dims)}
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


def _fake_input(port: Port, sizes: Mapping[str, int], mode: FakeTensorMode) -> object:
    if not port.is_tensor:
        return port.constant
    shape = [sizes[d] if isinstance(d, str) else d for d in port.shape]
    dynamic = [DimDynamic.DUCK if isinstance(d, str) else DimDynamic.STATIC for d in port.shape]
    example = torch.empty(shape, dtype=port.dtype)
    context: StatelessSymbolicContext = StatelessSymbolicContext(dynamic_sizes=dynamic)  # type: ignore
    return mode.from_tensor(example, symbolic_context=context)
