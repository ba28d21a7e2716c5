"""From a rewritten program to an exported one, which the ONNX exporter reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.fx.traceback import preserve_node_meta

from qcompiler.backends.onnxruntime.rewrite import Rewriter
from qcompiler.errors import BackendError
from qcompiler.io import Signature
from qcompiler.program import Program, is_tensor, node_id
from qcompiler.samples import random_inputs


def trace(rewriter: Rewriter, program: Program) -> torch.export.ExportedProgram:
    """The rewritten graph as a function of the tensor inputs, with ids in `meta["custom"]`."""
    tensors = [x for x in random_inputs(program.io, 1) if isinstance(x, Tensor)]

    def bounded(name: str) -> object:
        low, high = program.io.dims[name]
        return torch.export.Dim.DYNAMIC(min=low, max=high)

    module = _Module(rewriter, program)
    try:
        return torch.export.export(
            module,
            tuple(x.float() if x.is_floating_point() else x for x in tensors),
            dynamic_shapes=dynamic_axes(program.io, bounded),
            strict=False,
        )
    except Exception as error:  # whatever the tracer stumbles over, told with its node
        raise blame(rewriter.graph, error) from error


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


def output_numbers(program: Program) -> dict[int, int]:
    """Position of a tensor in the program's outputs → its number among the ONNX outputs."""
    numbers: dict[fx.Node, int] = {}
    positions = {}
    for position, value in enumerate(outputs_of(program)):
        if is_tensor(value):
            assert isinstance(value, fx.Node)
            positions[position] = numbers.setdefault(value, len(numbers))
        elif isinstance(value, fx.Node):
            raise BackendError(
                f"output {position} ({node_id(value)}) is a number, not a tensor; an ONNX model "
                "yields tensors only. Let the model return tensors, or use --backend reference"
            )
    return positions


def outputs_of(program: Program) -> tuple[object, ...]:
    """The program's outputs: nodes and constants."""
    output = next(n for n in program.graph.nodes if n.op == "output")
    values = output.args[0]
    assert isinstance(values, tuple | list)
    return tuple(values)


def blame(graph: fx.Graph, error: Exception) -> BackendError:
    """The error for `error`, with the id of the node of `graph` that its text names."""
    causes = [error]
    while isinstance(cause := causes[-1].__cause__, Exception):
        causes.append(cause)
    for node in graph.nodes:
        if node.meta.get("custom") and any(f"%{node.name} :" in str(e) for e in causes):
            return BackendError(
                f"onnxruntime: node {node.meta['custom']['id']} ({node.target}) cannot be written "
                f"as ONNX: {first_line(causes[-1])}; compile with --backend reference"
            )
    return BackendError(
        f"onnxruntime: the program cannot be written as ONNX: {first_line(causes[-1])}; "
        "compile with --backend reference"
    )


def first_line(error: BaseException) -> str:
    """The beginning of an error's text; these libraries append pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Module(nn.Module):
    """The rewritten graph as a module of its tensors, run node by node so that ids survive."""

    def __init__(self, rewriter: Rewriter, program: Program) -> None:
        super().__init__()
        for name, tensor in rewriter.tensors.items():
            self.register_buffer(name, tensor)
        self._runner = fx.Interpreter(fx.GraphModule(nn.Module(), rewriter.graph))
        self._ports = program.io.ports
        self._picked = {number: at for at, number in output_numbers(program).items()}

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
        return tuple(outputs[at] for at in self._picked.values())
