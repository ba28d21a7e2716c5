"""From a program to an ONNX model, with our node ids on the ONNX nodes."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ml_dtypes
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import fx

from qcompiler.export.dialect import Dialect
from qcompiler.export.draft import Draft
from qcompiler.export.trace import blame, dynamic_axes, tensor_outputs, trace
from qcompiler.program import ID_KEY, Program
from qcompiler.version import __version__

TARGET = "qcompiler.target"
KERNELS = "qcompiler.kernels"
BYTES = "qcompiler.bytes"


def to_model(program: Program, dialect: Dialect) -> ir.Model:
    """The program as an ONNX model that holds all its weights.

    Its metadata tell the target, the kernel of each site, the bytes of its weights, and each
    node's id.
    """
    wanted = tensor_outputs(program)
    draft = dialect.lower(program)
    with _quiet():
        model, traced = _export(draft, program, dialect)
    _label(model, traced)
    _name_weights(model, draft.names)
    _name_outputs(model, [program.io.output_names[at] for at in wanted])
    _unshare_zeros(model)
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value]
    model.producer_name, model.producer_version = "qcompiler", __version__
    model.metadata_props.update(program.metadata)
    model.metadata_props[TARGET] = dialect.name
    model.metadata_props[BYTES] = str(sum(w.nbytes for w in weights))
    model.metadata_props[KERNELS] = json.dumps(draft.kernels)
    return model


def _export(draft: Draft, program: Program, dialect: Dialect) -> tuple[ir.Model, fx.Graph]:
    # Weights are in their final form; evaluating what reads them would write them out as floats.
    stored = draft.tensors.keys() - program.slots.keys()

    def keep(node: ir.Node) -> bool | None:
        return False if any(v is not None and v.name in stored for v in node.inputs) else None

    graph = draft.graph
    try:
        exported = trace(draft, program, dialect.float32)
        graph = exported.graph
        result = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=draft.opset,
            optimize=False,
            verbose=False,
            dynamic_shapes=dynamic_axes(program.io, lambda name: name),
            input_names=[port.name for port in program.io.tensors],
        )
        assert result is not None and result.exported_program is not None
        _narrow(result.model, draft.nibbles)  # before equal weights of both types become one
        optimizer.optimize_ir(result.model, should_fold=keep)
        _retype(result.model)
    except Exception as error:  # whatever torch stumbles over, told with its node
        raise blame(dialect.name, graph, error) from error
    return result.model, result.exported_program.graph


def _retype(model: ir.Model) -> None:
    """The optimizer, when it makes a batch norm part of a bfloat16 convolution, leaves the new
    weight in float32."""
    for node in model.graph:
        x = node.inputs[0] if node.op_type in ("Conv", "ConvTranspose", "Gemm") else None
        for value in node.inputs[1:]:
            if x is None or x.dtype is None or value is None or value.const_value is None:
                continue
            if value.dtype != x.dtype:
                array = value.const_value.numpy().astype(x.dtype.numpy())
                value.const_value = ir.tensor(array, name=value.name)
                value.dtype = x.dtype


def _label(model: ir.Model, traced: fx.Graph) -> None:
    """Our id as name and metadata of each node; what the exporter noted (paths, code) goes."""
    ids = {n.name: n.meta["custom"]["id"] for n in traced.nodes if n.meta.get("custom")}
    for number, node in enumerate(model.graph):
        text = node.metadata_props.get("pkg.torch.onnx.fx_node", "")
        id = ids.get(text.partition(" ")[0].removeprefix("%"))
        node.metadata_props.clear()
        if id is not None:
            node.metadata_props[ID_KEY] = id
            node.name = f"{id}:{node.op_type}.{number}"
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _narrow(model: ir.Model, nibbles: Mapping[str, bool]) -> None:
    """Store as 4 bits what fits in them: the trace had to call them 8 bits."""
    for name, signed in nibbles.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy().astype(ml_dtypes.int4 if signed else ml_dtypes.uint4)
        value.const_value = ir.tensor(array, name=name)
        value.dtype = value.const_value.dtype


def _name_weights(model: ir.Model, names: Mapping[str, str]) -> None:
    """The program's names of parameters, where no input or output has them."""
    wanted, kept = set(names.values()), {*model.graph.inputs, *model.graph.outputs}
    for value in (v for node in model.graph for v in node.outputs):
        if value.name in wanted and value not in kept:
            value.name = f"{value.name}:value"  # the exporter's own word for it, which says nothing
    taken = _names(model)
    for value in list(model.graph.initializers.values()):
        name = names.get(value.name or "")
        if name is not None and name not in taken:
            taken.add(name)
            value.name = name


def _name_outputs(model: ir.Model, names: list[str]) -> None:
    """Each output is a value of its own with a name of its own.

    The value of two outputs, or of an input or a weight, is copied by an Identity.
    """
    graph, seen = model.graph, set[ir.Value]()
    for at, value in enumerate(graph.outputs):
        if value in seen or value.producer() is None:
            node = ir.node("Identity", [value], name=f"{names[at]}:Identity")
            copy = node.outputs[0]
            copy.shape, copy.type = value.shape, value.type
            graph.append(node)
            graph.outputs[at] = copy
        seen.add(graph.outputs[at])
    for value in [*graph.initializers.values(), *(v for node in graph for v in node.outputs)]:
        if value.name in names and value not in seen:
            value.name = f"{value.name}:value"
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name


def _names(model: ir.Model) -> set[str | None]:
    values = [v for node in model.graph for v in node.outputs]
    return {v.name for v in (*values, *model.graph.inputs, *model.graph.initializers.values())}


def _unshare_zeros(model: ir.Model) -> None:
    """Give each kernel its own zero points. ONNX Runtime, when it turns int8 weights into uint8,
    makes a new tensor for each reader, and fails at the second, which has the same name."""
    places = {"DequantizeLinear": 2, "MatMulInteger": 3}
    for node in model.graph:
        at = places.get(node.op_type, len(node.inputs))
        zero = node.inputs[at] if at < len(node.inputs) else None
        if zero is not None and zero.const_value is not None and len(zero.uses()) > 1:
            name = f"{zero.name}:{node.name}"
            own = ir.tensor(zero.const_value.numpy(), name=name)
            copy = ir.Value(name=name, type=zero.type, shape=zero.shape, const_value=own)
            model.graph.register_initializer(copy)
            node.replace_input_with(at, copy)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks about its own internals; a reader of our output can act on none of it."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
