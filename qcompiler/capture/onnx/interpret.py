"""The graph of a file as a torch module: node after node through the table, under torch.export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx.traceback import annotate

from qcompiler.capture.onnx.call import Call, NeedsValue, Value, name_of
from qcompiler.capture.onnx.known import FOLDS, array
from qcompiler.capture.onnx.table import OPERATORS, Result
from qcompiler.capture.onnx.types import to_tensor
from qcompiler.errors import BadInput, first_line
from qcompiler.program import ID_KEY

NODE = "onnx"
"""Key in `meta["custom"]` of a traced node: the name of the ONNX node that it came from."""


class Interpreter(nn.Module):
    """`forward(*inputs)` computes the graph."""

    def __init__(self, model: ir.Model) -> None:
        super().__init__()
        self.baked: Mapping[str, np.ndarray] = {}
        """Inputs that have the values given here."""
        self.open: Sequence[Mapping[int, str]] = ()
        """Axis → name of the dimension, for the dynamic axes of each input."""
        initializers = model.graph.initializers
        self.names = {f"w{number}": name for number, name in enumerate(initializers)}
        """Buffer → the initializer's own name."""
        self._model = model
        for buffer, name in self.names.items():
            self.register_buffer(buffer, _load(name, _stored(initializers[name])))

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        self._unite(inputs)
        values: dict[ir.Value, Value] = {}
        for buffer, name in self.names.items():
            initializer = self._model.graph.initializers[name]
            values[initializer] = self._weight(buffer, _stored(initializer))
        for value, tensor in zip(model_inputs(self._model), inputs, strict=True):
            values[value] = self._input(value, tensor)
        for node in self._model.graph:
            with annotate({NODE: _scope(node)}):
                self._run(node, values)
        outputs = {}
        for value in self._model.graph.outputs:
            if value not in values:
                raise BadInput(f"output {value.name!r} is computed by no node")
            outputs[str(value.name)] = values[value].tensor
        return outputs

    def _unite(self, inputs: Sequence[Tensor]) -> None:
        """Dimensions that have one name in the file are one dimension."""
        first: dict[str, int] = {}
        for axes, x in zip(self.open, inputs, strict=True):
            for axis, name in axes.items():
                torch._check(x.shape[axis] == first.setdefault(name, x.shape[axis]))

    def _weight(self, buffer: str, stored: ir.TensorProtocol) -> Value:
        return Value(
            make=lambda: getattr(self, buffer),
            read=lambda: np.asarray(stored.numpy()),
            type=stored.dtype,
            size=stored.size,
        )

    def _input(self, value: ir.Value, tensor: Tensor) -> Value:
        name = str(value.name)
        if name in self.baked:
            known = self.baked[name]
            return Value(read=lambda: known, size=known.size, type=value.dtype)
        return Value(make=lambda: tensor, type=value.dtype, sources=frozenset({name}))

    def _run(self, node: ir.Node, values: dict[ir.Value, Value]) -> None:
        given = [None if v is None else values.get(v) for v in node.inputs]
        if any(v is not None and g is None for v, g in zip(node.inputs, given, strict=True)):
            raise BadInput(f"node {name_of(node)!r}: an input is computed by no node before it")
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = self._model.graph.opset_imports.get(domain, 1)
        call = Call(node, node.version or version, given)
        try:
            result = _fold(call) if not domain else None
            if result is None:
                result = OPERATORS[domain, node.op_type](call)
        except (BadInput, NeedsValue):
            raise
        except Exception as error:  # whatever torch says to the numbers in a stranger's file
            raise call.refusal(f"{first_line(error)}; its inputs are {_shapes(call)}") from error
        sources = frozenset().union(*(v.sources for v in given if v is not None))
        parts = result if isinstance(result, tuple) else (result,)
        for out, part in zip(node.outputs, parts, strict=False):
            if part is not None:
                # What is known depends on sizes alone.
                values[out] = Value.of(part, sources if isinstance(part, Tensor) else frozenset())


def model_inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs that a caller gives: those of the graph that have no initializer."""
    return [v for v in model.graph.inputs if v.name not in model.graph.initializers]


def _scope(node: ir.Node) -> str:
    """The node's name; in a file of ours that of the node in the source that it came from."""
    own = node.metadata_props.get(ID_KEY)
    return own.rpartition("/")[0] if own else name_of(node)


def _fold(call: Call) -> Result | None:
    """The result of shape arithmetic, if all inputs are known."""
    function = FOLDS.get(call.node.op_type)
    present = [v for v in call.values if v is not None]
    if function is None or not all(v.folds for v in present):
        return None
    try:
        result = function(call, *(v.known for v in present))
    except (ArithmeticError, ValueError, TypeError):
        return None  # division by zero and the like are for the tensors' arithmetic to answer
    parts = result if isinstance(result, tuple) or result is None else (result,)
    # NumPy gives bare elements where an array has no axes.
    return parts and tuple(
        np.asarray(p) if isinstance(p, np.ndarray | np.generic) else array(p) for p in parts
    )


def _stored(initializer: ir.Value) -> ir.TensorProtocol:
    assert initializer.const_value is not None
    return initializer.const_value


def _load(name: str, stored: ir.TensorProtocol) -> Tensor:
    try:
        return to_tensor(stored.numpy())
    except Exception as error:  # sizes that do not fit the bytes, types that torch lacks
        raise BadInput(f"the tensor {name!r} cannot be read: {first_line(error)}") from error


def _shapes(call: Call) -> str:
    words = []
    for value in call.values:
        shape = None if value is None else list(value.tensor.shape)
        words.append("left out" if shape is None else str(shape))
    return ", ".join(words) or "none"
