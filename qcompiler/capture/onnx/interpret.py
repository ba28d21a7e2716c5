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
from qcompiler.errors import BadInput

NODE = "onnx"
"""Key in `meta["custom"]` of a traced node: the name of the ONNX node that it came from."""
ID = "qcompiler.id"
"""Key of a node's metadata in files that we write: its id in our program."""


class Interpreter(nn.Module):
    """`forward(*inputs)` computes the graph; inputs in `baked` have the values given there.

    `open_` names the dynamic axes of each input.
    """

    def __init__(
        self, model: ir.Model, baked: Mapping[str, np.ndarray], open_: Sequence[Mapping[int, str]]
    ) -> None:
        super().__init__()
        self.inputs = model_inputs(model)
        self.names: dict[str, str] = {}
        """Buffer → the initializer's own name."""
        self._model = model
        self._baked = baked
        self._open = open_
        self._weights: dict[str, str] = {}
        for number, (name, value) in enumerate(model.graph.initializers.items()):
            assert value.const_value is not None
            buffer = f"w{number}"
            self.register_buffer(buffer, _load(name, value.const_value))
            self.names[buffer] = name
            self._weights[name] = buffer

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        self._unite(inputs)
        values: dict[ir.Value, Value] = {}
        for name, initializer in self._model.graph.initializers.items():
            values[initializer] = self._weight(name, initializer)
        for value, tensor in zip(self.inputs, inputs, strict=True):
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
        for axes, x in zip(self._open, inputs, strict=True):
            for axis, name in axes.items():
                torch._check(x.shape[axis] == first.setdefault(name, x.shape[axis]))

    def _weight(self, name: str, initializer: ir.Value) -> Value:
        stored = initializer.const_value
        assert stored is not None
        buffer = self._weights[name]
        return Value(
            make=lambda: getattr(self, buffer),
            read=lambda: np.asarray(stored.numpy()),
            type=stored.dtype,
            size=stored.size,
        )

    def _input(self, value: ir.Value, tensor: Tensor) -> Value:
        name = str(value.name)
        if name in self._baked:
            array = self._baked[name]
            return Value(read=lambda: array, size=array.size, type=value.dtype)
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
            raise call.refusal(f"{brief(error)}; its inputs are {_shapes(call)}") from error
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
    own = node.metadata_props.get(ID)
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


def _load(name: str, stored: ir.TensorProtocol) -> Tensor:
    try:
        return to_tensor(stored.numpy())
    except Exception as error:  # sizes that do not fit the bytes, types that torch lacks
        raise BadInput(f"the tensor {name!r} cannot be read: {brief(error)}") from error


def _shapes(call: Call) -> str:
    words = []
    for value in call.values:
        shape = None if value is None else list(value.tensor.shape)
        words.append("left out" if shape is None else str(shape))
    return ", ".join(words) or "none"


def brief(error: BaseException) -> str:
    """The first line with words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
