"""Reading an ONNX file from a stranger: everything that can be wrong with it is found first.

Nothing is computed before the file was parsed, its structure checked by ONNX's own checker, its
external data found inside its folder, and every operator found in the table.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from qcompiler.capture.onnx import ops as _ops  # fills the table
from qcompiler.capture.onnx.call import name_of
from qcompiler.capture.onnx.functions import spell_out
from qcompiler.capture.onnx.table import OPERATORS
from qcompiler.errors import BadInput

del _ops
OLDEST = 7
"""The first operator set whose broadcasting is that of today."""
CONTROL = ("If", "Loop", "Scan", "SequenceMap")


def read_model(path: Path) -> ir.Model:
    """The model in `path`, functions inlined and constants lifted; its weights are not read yet."""
    if not path.is_file():
        raise BadInput(f"no file at {path}")
    proto = _parse(path)
    _check_external_data(proto, path)
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # the checker's own types, and what its file reading raises
        raise BadInput(f"{path} is no valid ONNX model: {_brief(error)}") from error
    try:
        model: ir.Model = ir.from_proto(spell_out(proto))
        ir.external_data.set_base_dir(model.graph, path.parent)
        _refuse_unknown(model, path)  # before inlining, so that the names are the file's own
        InlinePass()(model)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    except BadInput:
        raise
    except Exception as error:  # onnx-ir raises many types, down to KeyError
        raise BadInput(f"{path} is no valid ONNX model: {_brief(error)}") from error
    _refuse_unknown(model, path)
    return model


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


def _check_external_data(proto: onnx.ModelProto, path: Path) -> None:
    """Each tensor in a file of its own lies inside the model's folder, and is all there."""
    folder = path.parent.resolve()
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        about = {entry.key: entry.value for entry in tensor.external_data}
        place = about.get("location", "")
        file = (folder / place).resolve()
        if not place or Path(place).is_absolute() or not file.is_relative_to(folder):
            raise BadInput(
                f"{path}: the data of {tensor.name!r} are said to be in {place!r}; refused: "
                "external data must lie in the folder of the model"
            )
        if not file.is_file():
            raise BadInput(
                f"{path}: the data of {tensor.name!r} are missing: no file at {file}. Copy it "
                "beside the model"
            )
        offset, length = _whole(about, "offset", tensor), _whole(about, "length", tensor)
        if offset + length > file.stat().st_size:
            raise BadInput(
                f"{path}: the data of {tensor.name!r} end at byte {offset + length:,} of {file}, "
                f"which has {file.stat().st_size:,}. Is it complete?"
            )


def _whole(about: dict[str, str], key: str, tensor: onnx.TensorProto) -> int:
    text = about.get(key, "0")
    if not text.isdigit():
        raise BadInput(f"the external data of {tensor.name!r} have {key} {text!r}; expected bytes")
    return int(text)


def _refuse_unknown(model: ir.Model, path: Path) -> None:
    """One error for all operators that are not in the table, each with a node that has it."""
    version = model.graph.opset_imports.get("")
    if version is not None and version < OLDEST:
        raise BadInput(
            f"{path} is written in operator set {version}; expected {OLDEST} or newer. Convert it "
            "with onnx.version_converter"
        )
    own = {(f.domain, f.name) for f in model.functions.values()}
    nodes = [*model.graph, *(n for f in model.functions.values() for n in f)]
    found = Counter[tuple[str, str]]()
    first: dict[tuple[str, str], str] = {}
    for node in nodes:
        domain = "" if node.domain == "ai.onnx" else node.domain
        key = (domain, node.op_type)
        if key not in own and key not in OPERATORS and key != ("", "Constant"):
            found[key] += 1
            first.setdefault(key, name_of(node))
    if not found:
        return
    words = [
        f"{op} (domain {domain or 'ai.onnx'!r}, node {first[domain, op]!r}"
        + (f" and {count - 1} more)" if count > 1 else ")")
        for (domain, op), count in found.items()
    ]
    loops = any(op in CONTROL and not domain for domain, op in found)
    cure = (
        "control flow has no place in a program without branches; export the model with fixed ones"
        if loops
        else "export the model with standard operators"
    )
    raise BadInput(
        f"{path} uses operators that qcompiler does not know: {', '.join(words)}; {cure}"
    )


def _brief(error: BaseException) -> str:
    """The first two lines with words; these libraries append the whole node or a context."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:400] or type(error).__name__
