"""From a draft to an exported program, which torch's ONNX exporter reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.fx.traceback import preserve_node_meta

from qcompiler.errors import BackendError, first_line
from qcompiler.export.draft import Draft
from qcompiler.io import Port, Signature
from qcompiler.program import Program, is_tensor, node_id
from qcompiler.recurrent import SHAPES
from qcompiler.samples import random_inputs


def trace(draft: Draft, program: Program, float32: bool) -> torch.export.ExportedProgram:
    """The draft as a function of the tensor inputs, with ids in `meta["custom"]`."""
    tensors = [x for x in random_inputs(program.io, 1) if isinstance(x, Tensor)]

    def bounded(name: str) -> object:
        low, high = program.io.dims[name]
        return torch.export.Dim.DYNAMIC(min=low, max=high)

    return torch.export.export(
        _Module(draft, program.io.ports, tensor_outputs(program)),
        tuple(x.float() if float32 and x.is_floating_point() else x for x in tensors),
        dynamic_shapes=dynamic_axes(program.io, bounded),
        strict=False,
    )


def dynamic_axes(
    io: Signature, dim: Callable[[str], object]
) -> tuple[tuple[dict[int, object], ...]]:
    """Axis → `dim(name)` for each tensor input, in the nesting of `forward(*inputs)`."""
    return (
        tuple(
            {axis: dim(size) for axis, size in enumerate(port.shape) if isinstance(size, str)}
            for port in io.tensors
        ),
    )


def tensor_outputs(program: Program) -> tuple[int, ...]:
    """Positions of the program's outputs that are tensors: the outputs of the file, in order."""
    found = []
    for position, value in enumerate(outputs_of(program)):
        if is_tensor(value):
            found.append(position)
        elif isinstance(value, fx.Node):
            raise BackendError(
                f"output {position} ({node_id(value)}) is a number, not a tensor; an ONNX model "
                "yields tensors only. Let the model return tensors, or use --backend reference"
            )
    return tuple(found)


def outputs_of(program: Program) -> tuple[object, ...]:
    """The program's outputs: nodes and constants."""
    output = next(n for n in program.graph.nodes if n.op == "output")
    values = output.args[0]
    assert isinstance(values, tuple | list)
    return tuple(values)


def blame(target: str, graph: fx.Graph, error: Exception) -> BackendError:
    """The error for `error`, with the id of the node of `graph` that its text names."""
    causes = [error]
    while isinstance(cause := causes[-1].__cause__, Exception):
        causes.append(cause)
    found = [n for n in graph.nodes if n.target in SHAPES]
    if found and any("Constraints violated" in str(e) for e in causes):
        return BackendError(
            f"{target}: node {_id_of(found[0])} ({found[0].target}) cannot be written as ONNX for "
            "sequences of any length: torch's exporter counts its steps. Capture the model with a "
            "fixed length (dynamic=False in Python, or a mapping that leaves that axis out; a file "
            "that fixes it), or run it with --backend cpu"
        )
    where = "the program"
    for node in graph.nodes:
        if node.meta.get("custom") and any(f"%{node.name} :" in str(e) for e in causes):
            where = f"node {node.meta['custom']['id']} ({node.target})"
            break
    return BackendError(
        f"{target}: {where} cannot be written as ONNX: {first_line(causes[-1])}; "
        "write that part of the model in other operators, or run it with --backend reference"
    )


class _Module(nn.Module):
    """A draft as a module of its tensors, run node by node so that ids survive."""

    def __init__(self, draft: Draft, ports: tuple[Port, ...], outputs: tuple[int, ...]) -> None:
        super().__init__()
        for name, tensor in draft.tensors.items():
            self.register_buffer(name, tensor)
        self._runner = fx.Interpreter(fx.GraphModule(nn.Module(), draft.graph))
        self._ports = ports
        self._outputs = outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = iter(inputs)
        feed = iter([next(given) if p.is_tensor else p.constant for p in self._ports])
        tensors = dict(self.named_buffers())
        values = [
            tensors[n.name] if n.name in tensors else next(feed)
            for n in self._runner.graph.nodes
            if n.op == "placeholder"
        ]
        with preserve_node_meta():
            outputs = self._runner.run(*values)
        return tuple(outputs[at] for at in self._outputs)


def _id_of(node: fx.Node) -> str:
    custom = node.meta.get("custom")
    return str(custom["id"]) if custom else node.name
