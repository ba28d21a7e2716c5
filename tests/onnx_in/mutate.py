"""Mutations of an ONNX file: of its bytes, and of the graph that they say.

Most keep what ONNX's checker asks for, so that they reach what reads the file after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import onnx
from numpy.random import Generator
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

T = TypeVar("T")
NUMBERS = (
    0, 1, -1, 2, 3, -2, 4, 7, -7, 255, 10**4, 2**31 - 1, -(2**31), 2**40, 2**63 - 1, -(2**63),
)  # fmt: skip
"""None makes work that a machine would do, but not soon."""
REALS = (float("nan"), float("inf"), -1.0, 0.0, 0.3, 1e38)
TEXTS = (b"", b"NOTSET", b"SAME_UPPER", b"linear", b"cubic", b"nearest", b"asymmetric", b"\xff\xfe")
LONG = "long" * 1000
PLACES = ("-1", "1", "", "../w.bin", "w.bin", str(2**62), "\0", "/", LONG)
TYPES = tuple(TensorProto.DataType.values())
OPERATORS = (
    "Relu", "Abs", "Not", "IsNaN", "Cast", "Shape", "Size", "NonZero", "Unique", "Compress",
    "EyeLike", "Identity", "Trilu", "Det", "TopK", "MatMul", "Add", "Mul", "Pow", "Mod", "Equal",
    "And", "BitShift", "Where", "Gather", "GatherElements", "GatherND", "Expand", "Tile",
    "Reshape", "Concat", "Slice", "Split", "Squeeze", "Unsqueeze", "Transpose", "Flatten",
    "CumSum", "OneHot", "Range", "ArgMax", "ConstantOfShape", "Resize", "Conv", "ConvTranspose",
    "MaxPool", "LpPool", "LSTM", "GRU", "DFT", "GridSample", "CenterCropPad", "Einsum",
    "ScatterND", "ScatterElements", "ReduceSum", "ReduceMax", "Softmax", "Hardmax",
    "LayerNormalization", "InstanceNormalization", "LRN", "Dropout", "DepthToSpace",
    "QLinearMatMul", "QuantizeLinear", "DequantizeLinear", "MatMulInteger", "Max", "Sum", "Clip",
    "If", "Loop", "StringNormalizer", "SequenceAt", "Optional",
)  # fmt: skip


def mutated(model: onnx.ModelProto, rng: Generator) -> bytes:
    """The bytes of a changed copy of `model`: up to two changes of one kind."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    changes = int(rng.integers(1, 3))
    if rng.random() < 0.3:
        data = bytearray(copy.SerializeToString())
        for _ in range(changes):
            _change_bytes(data, rng)
        return bytes(data)
    for _ in range(changes):
        _pick(STRUCTURAL, rng)(copy.graph, rng)
    if rng.random() < 0.1:
        copy.opset_import[0].version = int(rng.integers(5, 31))
    return copy.SerializeToString()


def _pick(items: Sequence[T], rng: Generator) -> T:
    return items[int(rng.integers(len(items)))]


def _change_bytes(data: bytearray, rng: Generator) -> None:
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 16))
    how = int(rng.integers(8))
    if how < 4:
        data[at] ^= 1 << int(rng.integers(8))
    elif how == 4:
        del data[at : at + length]
    elif how == 5:
        data[at:at] = rng.bytes(length)
    elif how == 6:  # a splice
        other = int(rng.integers(len(data)))
        data[at:at] = data[other : other + 4 * length]
    else:
        del data[at + 1 :]


# --- attributes ---------------------------------------------------------------------------------


def _value_of_attribute(graph: onnx.GraphProto, rng: Generator) -> None:
    if found := [a for n in graph.node for a in n.attribute]:
        _change_value(_pick(found, rng), rng)


def _change_value(attribute: AttributeProto, rng: Generator) -> None:
    if attribute.ints:
        attribute.ints[int(rng.integers(len(attribute.ints)))] = _pick(NUMBERS, rng)
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = _pick(REALS, rng)
    elif attribute.type == AttributeProto.STRING:
        attribute.s = _pick(TEXTS, rng)
    elif attribute.type == AttributeProto.INT:
        attribute.i = _pick(NUMBERS, rng)


def _length_of_attribute(graph: onnx.GraphProto, rng: Generator) -> None:
    if found := [a for n in graph.node for a in n.attribute if a.ints]:
        attribute = _pick(found, rng)
        if rng.random() < 0.5:
            attribute.ints.append(_pick(NUMBERS, rng))
        else:
            attribute.ints.pop()


def _attribute(graph: onnx.GraphProto, rng: Generator) -> None:
    """Drop one, or set one that the operator may have."""
    node = _pick(graph.node, rng)
    if node.attribute and rng.random() < 0.3:
        del node.attribute[int(rng.integers(len(node.attribute)))]
        return
    known = onnx.defs.get_schema(node.op_type).attributes if onnx.defs.has(node.op_type) else {}
    free = sorted(set(known) - {a.name for a in node.attribute})
    if not free:
        return
    name = _pick(free, rng)
    made = {
        AttributeProto.INT: _pick(NUMBERS, rng),
        AttributeProto.FLOAT: _pick(REALS, rng),
        AttributeProto.STRING: _pick(TEXTS, rng),
        AttributeProto.INTS: [_pick(NUMBERS, rng) for _ in range(int(rng.integers(1, 6)))],
    }.get(known[name].type.value)
    if made is not None:
        node.attribute.append(helper.make_attribute(name, made))


# --- nodes --------------------------------------------------------------------------------------


def _swap_inputs(graph: onnx.GraphProto, rng: Generator) -> None:
    if found := [n for n in graph.node if len(n.input) > 1]:
        node = _pick(found, rng)
        i, j = int(rng.integers(len(node.input))), int(rng.integers(len(node.input)))
        node.input[i], node.input[j] = node.input[j], node.input[i]


def _another_input(graph: onnx.GraphProto, rng: Generator) -> None:
    """Another value in place of an input, one more, or one less; mostly values from before."""
    at = int(rng.integers(len(graph.node)))
    node, last = graph.node[at], at if rng.random() < 0.9 else len(graph.node)
    values = ["x", *(t.name for t in graph.initializer),
              *(o for n in graph.node[:last] for o in n.output)]  # fmt: skip
    value = _pick(values, rng) if rng.random() < 0.9 else _pick(("", "nobody"), rng)
    if node.input and rng.random() < 0.8:
        node.input[int(rng.integers(len(node.input)))] = value
    elif rng.random() < 0.5:
        node.input.append(value)
    elif node.input:
        node.input.pop()


def _rename(graph: onnx.GraphProto, rng: Generator) -> None:
    """A value gets another name, or that of another one."""
    node = _pick(graph.node, rng)
    if node.output:
        taken = [o for n in graph.node for o in n.output]
        node.output[int(rng.integers(len(node.output)))] = _pick(["", "new", LONG, *taken], rng)


def _operator(graph: onnx.GraphProto, rng: Generator) -> None:
    """Another operator in the same place, with as many inputs as it may have."""
    node = _pick(graph.node, rng)
    node.op_type = _pick(OPERATORS, rng)
    if rng.random() < 0.8:
        schema = onnx.defs.get_schema(node.op_type)
        known = set(schema.attributes)
        for attribute in [a for a in node.attribute if a.name not in known]:
            node.attribute.remove(attribute)
        del node.input[schema.max_input :]
        while len(node.input) < schema.min_input:
            node.input.append(_pick(["x", *(t.name for t in graph.initializer)], rng))


def _drop(graph: onnx.GraphProto, rng: Generator) -> None:
    """A node is gone; its readers mostly read its input instead."""
    at = int(rng.integers(len(graph.node)))
    node = NodeProto()
    node.CopyFrom(graph.node[at])
    if len(graph.node) == 1:
        return
    del graph.node[at]
    if node.input and rng.random() < 0.8:
        for other in graph.node:
            for i, name in enumerate(other.input):
                if name in node.output:
                    other.input[i] = node.input[0]


def _order(graph: onnx.GraphProto, rng: Generator) -> None:
    nodes = [NodeProto() for _ in graph.node]
    for copy, node in zip(nodes, graph.node, strict=True):
        copy.CopyFrom(node)
    at = int(rng.integers(len(nodes)))
    nodes.insert(int(rng.integers(len(nodes))), nodes[at] if rng.random() < 0.3 else nodes.pop(at))
    del graph.node[:]
    graph.node.extend(nodes)


# --- tensors ------------------------------------------------------------------------------------


def _stored(graph: onnx.GraphProto, rng: Generator) -> None:
    """Sizes, type or place of a stored tensor, which then do not fit its bytes."""
    tensor = _pick(graph.initializer, rng)
    if tensor.external_data and rng.random() < 0.5:
        _pick(tensor.external_data, rng).value = _pick(PLACES, rng)
    elif tensor.dims and rng.random() < 0.5:
        tensor.dims[int(rng.integers(len(tensor.dims)))] = _pick(NUMBERS, rng)
    else:
        tensor.data_type = _pick(TYPES, rng)


def _numbers(graph: onnx.GraphProto, rng: Generator) -> None:
    """Another tensor in place of a stored one: often a few integers, as shapes are made of."""
    tensor = _pick(graph.initializer, rng)
    whole = [t for t in graph.initializer if t.data_type == TensorProto.INT64]
    if whole and rng.random() < 0.6:
        tensor = _pick(whole, rng)
        values = numpy_helper.to_array(tensor).copy()
        if values.size:
            values.reshape(-1)[int(rng.integers(values.size))] = _pick(NUMBERS, rng)
    else:
        shape = [int(n) for n in rng.integers(0, 9, int(rng.integers(0, 4)))]
        kind = _pick((np.float32, np.float32, np.int64, np.int8, np.float16, np.bool_), rng)
        values = np.asarray(rng.integers(-3, 9, shape)).astype(kind)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _ports(graph: onnx.GraphProto, rng: Generator) -> None:
    port = _pick([*graph.input, *graph.output], rng).type.tensor_type
    how = int(rng.integers(5))
    if how == 0:
        port.elem_type = _pick(TYPES, rng)
    elif how == 1:
        port.elem_type = _pick((TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT64), rng)
    elif how == 2 and port.shape.dim:
        _pick(port.shape.dim, rng).dim_value = _pick(NUMBERS, rng)
    elif how == 3 and port.shape.dim:
        port.shape.dim.pop()
    else:
        port.shape.dim.add().dim_param = _pick(("batch", "", "a + b", "9" * 30), rng)


STRUCTURAL = (
    _value_of_attribute, _value_of_attribute, _length_of_attribute, _attribute, _attribute,
    _attribute, _swap_inputs, _another_input, _another_input, _rename, _operator, _operator,
    _operator, _drop, _order, _stored, _numbers, _numbers, _numbers, _ports,
)  # fmt: skip
