"""From a rewritten program to an ONNX model, with our node ids on the ONNX nodes."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import ml_dtypes
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, fx, nn
from torch.fx.traceback import preserve_node_meta

from qcompiler.backends.onnxruntime.rewrite import Rewriter
from qcompiler.errors import BackendError
from qcompiler.io import Signature
from qcompiler.program import Program, is_tensor, node_id
from qcompiler.samples import random_inputs

OPSET = 21
"""The first with 4 bit numbers."""
ID = "qcompiler.id"
KERNELS = "qcompiler.kernels"
BYTES = "qcompiler.bytes"


def to_onnx(program: Program) -> ir.Model:
    """The program as an ONNX model that holds all its weights."""
    rewriter = Rewriter(program)
    rewriter.run()
    with _quiet():
        exported = _trace(rewriter, program)
        try:
            result = torch.onnx.export(
                exported, dynamo=True, opset_version=OPSET, verbose=False, optimize=False,
                dynamic_shapes=_dims(program.io, lambda name: name),
                input_names=[port.name for port in program.io.tensors],
            )
        except Exception as error:  # whatever the exporter stumbles over, told with its node
            raise BackendError(_blame(exported.graph, error)) from error
    assert result is not None
    model = result.model
    # Weights are in their final form; evaluating what reads them would write them out as floats.
    stored = rewriter.tensors.keys() - program.slots.keys()
    optimizer.optimize_ir(
        model, should_fold=lambda n: False if any(v and v.name in stored for v in n.inputs) else None
    )
    _label(model, result.exported_program.graph)
    _narrow(model, rewriter.nibbles)
    _unshare_zeros(model)
    model.metadata_props[KERNELS] = json.dumps(rewriter.kernels)
    model.metadata_props[BYTES] = str(
        sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    )
    return model


def output_numbers(program: Program) -> dict[int, int]:
    """Position of a tensor in the program's outputs → its number among the ONNX outputs."""
    numbers: dict[fx.Node, int] = {}
    result = {}
    output = next(n for n in program.graph.nodes if n.op == "output")
    for position, value in enumerate(output.args[0]):
        if is_tensor(value):
            result[position] = numbers.setdefault(value, len(numbers))
        elif isinstance(value, fx.Node):
            raise BackendError(
                f"output {position} ({node_id(value)}) is a size, not a tensor; an ONNX model "
                "yields tensors only. Let the model return tensors, or use --backend reference"
            )
    return result


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
            for n in self._runner.graph.nodes if n.op == "placeholder"
        ]
        with preserve_node_meta():
            outputs = self._runner.run(*values)
        return tuple(outputs[at] for at in self._picked.values())


def _trace(rewriter: Rewriter, program: Program) -> torch.export.ExportedProgram:
    inputs = random_inputs(program.io, 1)
    tensors = tuple(x.float() if x.is_floating_point() else x for x in inputs if isinstance(x, Tensor))
    try:
        return torch.export.export(
            _Module(rewriter, program), tensors, strict=False,
            dynamic_shapes=_dims(program.io, _bounded(program.io)),
        )
    except Exception as error:
        raise BackendError(_blame(rewriter.graph, error)) from error


def _dims(io: Signature, dim: Callable[[str], object]) -> tuple[tuple[dict[int, object], ...]]:
    """The dynamic axes of each tensor input, in the nesting of `forward(*inputs)`."""
    return (
        tuple(
            {axis: dim(size) for axis, size in enumerate(port.shape) if isinstance(size, str)}
            for port in io.tensors
        ),
    )


def _bounded(io: Signature) -> Callable[[str], object]:
    def dim(name: str) -> object:
        low, high = io.dims[name]
        return torch.export.Dim.DYNAMIC(min=low, max=high)

    return dim


def _label(model: ir.Model, traced: fx.Graph) -> None:
    """Our id as name and metadata of each node; what the exporter noted (paths, code) goes."""
    ids = {n.name: n.meta["custom"]["id"] for n in traced.nodes if n.meta.get("custom")}
    for number, node in enumerate(model.graph):
        text = node.metadata_props.get("pkg.torch.onnx.fx_node", "")
        id = ids.get(text.partition(" ")[0].removeprefix("%"))
        node.metadata_props.clear()
        if id is not None:
            node.metadata_props[ID] = id
            node.name = f"{id}:{node.op_type}.{number}"
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _unshare_zeros(model: ir.Model) -> None:
    """Give each kernel its own zero points. ONNX Runtime, when it turns int8 weights into uint8,
    makes a new tensor for each reader and fails at the second, which has the same name."""
    places = {"DequantizeLinear": 2, "MatMulInteger": 3}
    for node in model.graph:
        at = places.get(node.op_type, len(node.inputs))
        zero = node.inputs[at] if at < len(node.inputs) else None
        if zero is not None and zero.const_value is not None and len(zero.uses()) > 1:
            name = f"{zero.name}:{node.name}"
            copy = ir.Value(
                name=name, type=zero.type, shape=zero.shape,
                const_value=ir.tensor(zero.const_value.numpy(), name=name),
            )
            model.graph.register_initializer(copy)
            node.replace_input_with(at, copy)


def _narrow(model: ir.Model, nibbles: Mapping[str, bool]) -> None:
    """Store as 4 bits what fits in them: the trace had to call them 8 bits."""
    for name, signed in nibbles.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy().astype(ml_dtypes.int4 if signed else ml_dtypes.uint4)
        value.const_value = ir.tensor(array, name=name)
        value.dtype = value.const_value.dtype


def _blame(graph: fx.Graph, error: Exception) -> str:
    """The exporter's first complaint, with the id of the node that it names."""
    text = str(error)
    for node in graph.nodes:
        if f"%{node.name} :" in text and node.meta.get("custom"):
            return (
                f"onnxruntime: node {node.meta['custom']['id']} ({node.target}) has no ONNX form: "
                f"{_first_line(error.__cause__ or error)}; compile with --backend reference"
            )
    return f"onnxruntime: the program cannot be written as ONNX: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks about its own internals; a reader of our output can act on none of it."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
