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

from qcompiler.backends.onnxruntime.rewrite import Rewriter
from qcompiler.backends.onnxruntime.trace import blame, dynamic_axes, trace
from qcompiler.program import Program

OPSET = 21
"""The first with 4 bit numbers."""
ID = "qcompiler.id"
KERNELS = "qcompiler.kernels"
BYTES = "qcompiler.bytes"


def to_onnx(program: Program) -> ir.Model:
    """The program as an ONNX model that holds all its weights.

    Its metadata tell the kernel of each site, the bytes of its weights, and each node's id.
    """
    rewriter = Rewriter(program)
    # Weights are in their final form; evaluating what reads them would write them out as floats.
    stored = rewriter.tensors.keys() - program.slots.keys()

    def keep(node: ir.Node) -> bool | None:
        return False if any(v is not None and v.name in stored for v in node.inputs) else None

    with _quiet():
        exported = trace(rewriter, program)
        try:
            result = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                dynamic_shapes=dynamic_axes(program.io, lambda name: name),
                input_names=[port.name for port in program.io.tensors],
            )
            assert result is not None and result.exported_program is not None
            model = result.model
            optimizer.optimize_ir(model, should_fold=keep)
        except Exception as error:  # whatever the exporter stumbles over, told with its node
            raise blame(exported.graph, error) from error
    _label(model, result.exported_program.graph)
    _narrow(model, rewriter.nibbles)
    _unshare_zeros(model)
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value]
    model.metadata_props[BYTES] = str(sum(w.nbytes for w in weights))
    model.metadata_props[KERNELS] = json.dumps(rewriter.kernels)
    return model


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


def _narrow(model: ir.Model, nibbles: Mapping[str, bool]) -> None:
    """Store as 4 bits what fits in them: the trace had to call them 8 bits."""
    for name, signed in nibbles.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy().astype(ml_dtypes.int4 if signed else ml_dtypes.uint4)
        value.const_value = ir.tensor(array, name=name)
        value.dtype = value.const_value.dtype


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
