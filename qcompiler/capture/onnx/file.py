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
from qcompiler.errors import BadInput, first_line


def read_model(path: Path) -> ir.Model:
    """The model in `path`, functions inlined and constants lifted; its weights are not read yet."""
    if not path.is_file():
        raise BadInput(f"no file at {path}")
    proto = _parse(path)
    check_names(proto, path)
    check_operators(proto, check_operator_set(proto, path), path)
    check_external_data(proto, path)
    try:
        onnx.checker.check_model(_with_shapes(proto) or str(path))
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


def _with_shapes(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy for the checker, which wants a shape for each input and output; runtimes do not, and
    many files leave them out. None if the file has them, or has data elsewhere, as copies cannot.
    """
    values = (*proto.graph.input, *proto.graph.output)
    bare = [v.type.HasField("tensor_type") and not v.type.tensor_type.HasField("shape")
            for v in values]  # fmt: skip
    elsewhere = onnx.TensorProto.EXTERNAL
    if not any(bare) or any(t.data_location == elsewhere for t in proto.graph.initializer):
        return None
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
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
