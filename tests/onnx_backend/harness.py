"""qcompiler's importer as an ONNX backend, for the node tests that come with the package `onnx`."""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests

import qcompiler
from qcompiler.capture.onnx.types import to_tensor


def node_tests() -> dict[str, TestCase]:
    """All node tests of the package, by name."""
    return {case.name: case for case in load_model_tests(kind="node")}


def run(model: onnx.ModelProto, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Capture the model through the front door, with these inputs, and run what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        tensors = tuple(to_tensor(np.asarray(x)) for x in inputs)
        program = qcompiler.capture(path, tensors, dynamic=False)
        outputs = program(*tensors)
    assert isinstance(outputs, dict)
    types = [ir.DataType(o.type.tensor_type.elem_type) for o in model.graph.output]
    return [_array(y, t) for y, t in zip(outputs.values(), types, strict=True)]


def check(case: TestCase) -> None:
    """Run one test case and compare with what it expects, at its own tolerances."""
    assert case.model is not None
    for given, wanted in case.data_sets or []:
        found = run(case.model, [_read(x) for x in given])
        for want, have in zip(map(_read, wanted), found, strict=True):
            assert have.dtype == want.dtype, f"{have.dtype} where {want.dtype} was expected"
            assert have.shape == want.shape, f"{have.shape} where {want.shape} was expected"
            if want.dtype.kind not in "biufc":  # types that numpy has from ml_dtypes
                want, have = want.astype(np.float32), have.astype(np.float32)
            np.testing.assert_allclose(have, want, rtol=case.rtol, atol=case.atol)


def _read(value: object) -> np.ndarray:
    """Test data are arrays, or tensors in ONNX's own form where NumPy lacks the type."""
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return np.asarray(value)


def _array(tensor: torch.Tensor, type: ir.DataType) -> np.ndarray:
    """`tensor` in the type of the file: what torch has no type for is held in a larger one."""
    wanted = type.numpy()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(wanted)
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
        return tensor.view(torch.uint8).numpy().view(wanted)
    return tensor.numpy().astype(wanted, copy=False)


OUTSIDE = {
    "control flow": {"If", "Loop", "Scan", "SequenceMap"},
    "random numbers": {
        "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
        "RandomUniformLike",
    },
    "images in files": {"ImageDecoder"},
}  # fmt: skip


def outside(case: TestCase) -> str | None:
    """Why a test is none of the float and integer tensor operators; None if it is."""
    model = case.model
    assert model is not None
    for node in model.graph.node:
        for what, operators in OUTSIDE.items():
            if node.op_type in operators:
                return what
        if "training" in node.domain or _trains(node, model):
            return "training"
        if node.domain not in ("", "ai.onnx"):
            return f"domain {node.domain}"
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type":
            return "sequences and optional values"
        if value.type.tensor_type.elem_type == onnx.TensorProto.STRING:
            return "strings"
    return None


def _trains(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """Whether a normalisation or dropout is asked for in training mode."""
    flag = any(a.name == "training_mode" and a.i for a in node.attribute)
    dropout = node.op_type == "Dropout" and len(node.input) > 2 and bool(node.input[2])
    return flag or dropout


def operator(case: TestCase) -> str:
    """The operator that a test is about: of the one node, or of the function spelled out."""
    assert case.model is not None
    nodes = case.model.graph.node
    if len(nodes) == 1:
        return str(nodes[0].op_type)
    words = case.name.removeprefix("test_").split("_")
    names = {n.lower(): n for n in onnx_operators()}
    for end in range(len(words), 0, -1):
        if name := names.get("".join(words[:end])):
            return name
    return "several"


def onnx_operators() -> set[str]:
    return {s.name for s in onnx.defs.get_all_schemas()}


REFUSED = {
    "test_linear_attention_*": "the standard defines it by a Scan over time",
    "test_not_[234]d": "written in operator set 1, which has another broadcasting",
    "test_optional_*": "optional values have no counterpart in a graph of tensors",
}
"""Pattern of tests → why they are refused with a message."""
DIGITS = {
    "test_attention_*bf16*": "one step of bfloat16 is 8 times what the test allows",
    "test_attention_4d_fp16": "2 of 192 numbers differ by the last bit of float16",
    "test_attention_4d_causal_fp16*": "2 of 192 numbers differ by the last bit of float16",
    "test_dft_inverse*": "2e-7 is expected where float64 gives 7e-16",
}
"""Pattern of tests → why the numbers are not within the test's tolerance."""


def matching(name: str, patterns: Mapping[str, str]) -> str | None:
    """The reason for a test that does not pass, or None."""
    return next((why for p, why in patterns.items() if fnmatch.fnmatch(name, p)), None)
