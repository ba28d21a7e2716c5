"""Reading an ONNX file from a stranger: everything that can be wrong with it is found first.

Nothing is computed before the file was parsed, its structure checked by ONNX's own checker, its
external data found inside its folder, and every operator found in the table.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from qcompiler.capture.onnx.call import name_of
from qcompiler.capture.onnx.checks import (
    check_external_data,
    check_functions,
    check_names,
    check_operator_set,
    check_operators,
    operator,
    refuse_unknown,
)
from qcompiler.capture.onnx.functions import spell_out
from qcompiler.capture.onnx.table import MICROSOFT
from qcompiler.errors import BadInput, first_line

STRAYS = ("SimplifiedLayerNormalization",)


def read_model(path: Path) -> ir.Model:
    """The model in `path`, functions inlined and constants lifted; its weights are not read yet."""
    if not path.is_file():
        raise BadInput(f"no file at {path}")
    proto = _parse(path)
    moved = _moved(proto)
    check_names(proto, path)
    check_operators(proto, check_operator_set(proto, path), path)
    check_external_data(proto, path)
    try:
        onnx.checker.check_model(_for_checker(proto, moved) or str(path))
    except Exception as error:  # the checker's own types, and what its file reading raises
        raise BadInput(f"{path} is no valid ONNX model: {first_line(error, lines=2)}") from error
    check_functions(proto, path)
    try:
        model: ir.Model = ir.from_proto(spell_out(proto))
        ir.external_data.set_base_dir(model.graph, path.parent)
        InlinePass()(model)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    except BadInput:
        raise
    except Exception as error:  # onnx-ir raises many types, down to KeyError
        raise BadInput(f"{path} is no valid ONNX model: {first_line(error, lines=2)}") from error
    refuse_unknown(((operator(n.domain, n.op_type), name_of(n)) for n in model.graph), path)
    return model


def _moved(proto: onnx.ModelProto) -> bool:
    """Put operators of ONNX Runtime that its optimizer writes as the standard's, which has none of
    their names, where they belong; whether there are any."""
    found = [n for n in proto.graph.node if n.op_type in STRAYS and n.domain in ("", "ai.onnx")]
    for node in found:
        node.domain = MICROSOFT
    if found and all(o.domain != MICROSOFT for o in proto.opset_import):
        proto.opset_import.add(domain=MICROSOFT, version=1)
    return bool(found)


def _for_checker(proto: onnx.ModelProto, moved: bool) -> onnx.ModelProto | None:
    """A copy for the checker, which wants a shape for each input and output; runtimes do not, and
    many files leave them out. None if the file itself will do.

    Data elsewhere, which were looked at before, are inputs of it: a copy has no folder.
    """
    values = (*proto.graph.input, *proto.graph.output)
    bare = [v.type.HasField("tensor_type") and not v.type.tensor_type.HasField("shape")
            for v in values]  # fmt: skip
    if not any(bare) and not moved:
        return None
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graph, given = copy.graph, {v.name for v in copy.graph.input}
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL and tensor.name not in given:
            kind, dims = tensor.data_type, tensor.dims
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, kind, dims))
    kept = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for value in (*copy.graph.input, *copy.graph.output):
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    return copy


def _parse(path: Path) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise BadInput(
            f"{path} is no ONNX file: expected a protobuf message (ModelProto), found "
            f"{path.stat().st_size:,} bytes that do not parse as one. Is it complete?"
        ) from error
    if not proto.HasField("graph") or not proto.graph.output:
        raise BadInput(f"{path} is no ONNX model: it has no graph with outputs. Is it complete?")
    return proto
