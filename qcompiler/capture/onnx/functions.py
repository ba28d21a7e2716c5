"""Operators that the standard defines by others are spelled out, unless the table has them whole.

Each becomes a call of a function of the model's own, with the body that the standard gives; what
inlines the functions of a file then inlines these too.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from qcompiler.capture.onnx.table import OPERATORS

DOMAIN = "qcompiler.functions"
DEPTH = 4
"""How often a body may itself be made of such operators."""


def spell_out(proto: onnx.ModelProto) -> onnx.ModelProto:
    """`proto` with the standard's own bodies in place of operators that the table lacks."""
    for _ in range(DEPTH):
        before, proto = proto, _spell_out_once(proto)
        if before is proto:
            break
    return proto


def _spell_out_once(proto: onnx.ModelProto) -> onnx.ModelProto:
    version = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)
    chosen = [n for n in proto.graph.node if _needs_body(n, version)]
    if not chosen:
        return proto
    types = _types(proto)
    for number, node in enumerate(chosen):
        body = _body(node, version, types)
        body.domain, body.name = DOMAIN, f"{node.op_type}_{number}"
        _drop_missing_outputs(body, node)
        proto.functions.append(body)
        _write_defaults(node, version)
        node.domain, node.op_type = body.domain, body.name
        wanted = set(body.attribute) | {a.name for a in body.attribute_proto}
        for attribute in [a for a in node.attribute if a.name not in wanted]:
            node.attribute.remove(attribute)
    proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return inlined(proto)


def inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """`proto` with the bodies of its functions in place of their calls."""
    model = ir.from_proto(proto)
    InlinePass()(model)
    return ir.to_proto(model)


def _needs_body(node: onnx.NodeProto, version: int) -> bool:
    if node.domain not in ("", "ai.onnx"):
        return False
    if ("", node.op_type) in OPERATORS and not (node.op_type == "Attention" and not plain(node)):
        return False
    return has_body(node.op_type, version)


def has_body(name: str, version: int) -> bool:
    """Whether the standard defines the operator `name` by others."""
    if not onnx.defs.has(name, version):
        return False
    schema = onnx.defs.get_schema(name, version)
    return bool(schema.has_function or schema.has_context_dependent_function)


def plain(node: onnx.NodeProto) -> bool:
    """Whether an Attention is softmax(q kᵀ · scale + mask) v and nothing else."""
    given = {a.name for a in node.attribute}
    known = {"scale", "is_causal", "q_num_heads", "kv_num_heads"}
    inputs = [bool(name) for name in node.input]
    outputs = [bool(name) for name in node.output]
    return given <= known and not any(inputs[4:]) and not any(outputs[1:])


def _body(
    node: onnx.NodeProto, version: int, types: dict[str, onnx.TypeProto]
) -> onnx.FunctionProto:
    """The newest body that the version of the file can use."""
    schema = onnx.defs.get_schema(node.op_type, version)
    body = onnx.FunctionProto()
    if schema.has_function:
        since = max(v for v in schema.function_opset_versions if v <= version)
        body.ParseFromString(schema.get_function_with_opset_version(since))
        return body
    since = max(v for v in schema.context_dependent_function_opset_versions if v <= version)
    inputs = [types.get(name, onnx.TypeProto()).SerializeToString() for name in node.input]
    text = node.SerializeToString()
    body.ParseFromString(
        schema.get_context_dependent_function_with_opset_version(since, text, inputs)
    )
    return body


def _drop_missing_outputs(body: onnx.FunctionProto, node: onnx.NodeProto) -> None:
    """Outputs that the body does not compute, because the node does not ask for them."""
    made = {name for n in body.node for name in n.output}
    while body.output and body.output[-1] not in made:
        body.output.pop()
        if len(node.output) > len(body.output):
            node.output.pop()
    for name in body.output:
        if name not in made:
            body.node.append(onnx.helper.make_node("Identity", [body.input[0]], [name]))


def _types(proto: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """Types of all values, as far as they can be inferred; bodies depend on them."""
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    types = {v.name: v.type for v in (*inferred.input, *inferred.value_info, *inferred.output)}
    for tensor in inferred.initializer:
        types.setdefault(
            tensor.name, onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
        )
    return types


def _write_defaults(node: onnx.NodeProto, version: int) -> None:
    """Attributes that are left out, written out: a function of a model knows no defaults."""
    given = {a.name for a in node.attribute}
    for name, about in onnx.defs.get_schema(node.op_type, version).attributes.items():
        if name not in given and about.default_value.name:
            node.attribute.append(about.default_value)
