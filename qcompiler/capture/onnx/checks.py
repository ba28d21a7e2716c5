"""What is checked of a parsed file before anything is done with it, each with its own message."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from qcompiler.capture.onnx import ops as _ops  # fills the table
from qcompiler.capture.onnx.functions import has_body
from qcompiler.capture.onnx.table import MICROSOFT, OPERATORS
from qcompiler.errors import BadInput

del _ops
OLDEST = 7
"""The first operator set whose broadcasting is that of today."""
INLINED = 8000
"""Nodes of a file with functions; onnx-ir's inliner takes time that grows with their square."""
CONTROL = ("If", "Loop", "Scan", "SequenceMap")
Operators = Iterable[tuple[tuple[str, str], str]]
"""(domain, operator) and the name of a node, for each node."""


def check_operator_set(proto: onnx.ModelProto, path: Path) -> int:
    """The version of the standard's operators that the file asks for, if it is one we read."""
    newest: int = onnx.defs.onnx_opset_version()
    version = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), newest)
    if version < OLDEST:
        raise BadInput(
            f"{path} is written in operator set {version}; expected {OLDEST} or newer. Convert it "
            "with onnx.version_converter"
        )
    if version > newest:
        raise BadInput(
            f"{path} is written in operator set {version}; the newest that onnx "
            f"{onnx.__version__} knows is {newest}. Install a newer onnx"
        )
    return int(version)


def check_names(proto: onnx.ModelProto, path: Path) -> None:
    """protobuf gives a text that is none as bytes, which nothing behind expects."""
    for node in _nodes(proto):
        for name in (node.op_type, node.domain, node.name, *node.input, *node.output):
            if not isinstance(name, str):
                raise BadInput(f"{path}: the name {name!r} in a node is no UTF-8 text")


def check_operators(proto: onnx.ModelProto, version: int, path: Path) -> None:
    """Every operator is in the table, a function of the file, or made of others by the standard."""
    own = {(f.domain, f.name) for f in proto.functions}
    refuse_unknown(
        (
            (key, node.name or f"{node.op_type}_{node.output[0] if node.output else ''}")
            for node in _nodes(proto)
            if (key := operator(node.domain, node.op_type)) not in own
            and (key[0] or key[1] in CONTROL or not has_body(node.op_type, version))
        ),
        path,
    )


def operator(domain: str, name: str) -> tuple[str, str]:
    return ("" if domain == "ai.onnx" else domain), name


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from proto.graph.node
    for function in proto.functions:
        yield from function.node


def check_functions(proto: onnx.ModelProto, path: Path) -> None:
    """Functions that call each other twice are a short file of 2ⁿ nodes. None calls itself here."""
    bodies = {(*operator(f.domain, f.name), f.overload): f.node for f in proto.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def size(nodes: Iterable[onnx.NodeProto]) -> int:
        total = 0
        for node in nodes:
            key = (*operator(node.domain, node.op_type), node.overload)
            if key in bodies and key not in sizes:
                sizes[key] = size(bodies[key])
            total += 1 + sizes.get(key, 0)
        return total

    written_out = size(proto.graph.node)
    if proto.functions and written_out > INLINED:
        raise BadInput(
            f"{path} has {written_out:,} nodes when its functions are written out in place of "
            f"their calls; expected at most {INLINED:,}. Write them out with "
            "onnx.inliner.inline_local_functions"
        )


def refuse_unknown(nodes: Operators, path: Path) -> None:
    """One error for all operators that are not in the table, each with a node that has it."""
    found = Counter[tuple[str, str]]()
    first: dict[tuple[str, str], str] = {}
    for key, name in nodes:
        if key not in OPERATORS and key != ("", "Constant"):
            found[key] += 1
            first.setdefault(key, name)
    if not found:
        return
    words = [
        f"{op} (domain {domain or 'ai.onnx'!r}, node {first[domain, op]!r}"
        + (f" and {count - 1} more)" if count > 1 else ")")
        for (domain, op), count in found.items()
    ]
    if len(words) > SHOWN:
        words = [*words[:SHOWN], f"and {len(words) - SHOWN} more"]
    cures = [cure for cure, is_one in CURES.items() if any(map(is_one, found))]
    cure = "; ".join(cures) or "export the model with standard operators"
    raise BadInput(
        f"{path} uses operators that qcompiler does not know: {', '.join(words)}; {cure}"
    )


CURES: dict[str, Callable[[tuple[str, str]], bool]] = {
    "control flow has no place in a program without branches; export the model with fixed ones": (
        lambda key: not key[0] and key[1] in CONTROL
    ),
    "operators of com.microsoft are mostly what an optimizer has fused: take the file from before "
    "it, or let it write one without fusion (of attention, embeddings, Gemm)": lambda key: (
        key[0] == MICROSOFT
    ),
}
"""What to do, and for which operators."""
SHOWN = 6
"""Operators that one message names."""


# --- external data ------------------------------------------------------------------------------


def check_external_data(proto: onnx.ModelProto, path: Path) -> None:
    """Each tensor in a file of its own lies inside the model's folder, and is all there."""
    for tensor in _tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_place(tensor, path)


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from proto.graph.initializer
    for node in _nodes(proto):
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors


def _check_place(tensor: onnx.TensorProto, path: Path) -> None:
    folder = path.parent.resolve()
    about = {entry.key: entry.value for entry in tensor.external_data}
    place, name = about.get("location", ""), tensor.name
    try:
        file = (folder / place).resolve()
        inside = bool(place) and not Path(place).is_absolute() and file.is_relative_to(folder)
        there = inside and file.is_file()
    except (OSError, ValueError):  # a name that no file can have
        inside = there = False
    if not inside:
        raise BadInput(
            f"{path}: the data of {name!r} are said to be in {place!r}; refused: "
            "external data must lie in the folder of the model"
        )
    if not there:
        raise BadInput(
            f"{path}: the data of {name!r} are missing: no file at {file}. Copy it beside the model"
        )
    needed, size = _bytes(tensor), file.stat().st_size
    offset, length = (
        _whole(about, key, default, f"{path}: the external data of {name!r}")
        for key, default in (("offset", 0), ("length", needed))
    )
    if length < needed:
        raise BadInput(
            f"{path}: the data of {name!r} are {length:,} bytes of {file}; its shape takes "
            f"{needed:,}"
        )
    if offset + length > size:
        raise BadInput(
            f"{path}: the data of {name!r} end at byte {offset + length:,} of {file}, "
            f"which has {size:,}. Is it complete?"
        )


def _bytes(tensor: onnx.TensorProto) -> int:
    """What a tensor of this shape and type takes; 0 where the type is none with a size."""
    try:
        bits: int = ir.DataType(tensor.data_type).bitwidth
    except (TypeError, ValueError):
        return 0
    count: int = math.prod(tensor.dims)
    return -(-count * bits // 8)


def _whole(about: dict[str, str], key: str, default: int, whose: str) -> int:
    text = about.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise BadInput(f"{whose} have {key} {text!r}; expected a number of bytes")
    return int(text)
