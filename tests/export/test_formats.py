"""What each format and operator becomes in a standard file, and that it computes the same."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

import qcompiler
from qcompiler.backends.onnxruntime.session import OnnxArtifact
from qcompiler.backends.openvino.session import OpenVinoArtifact
from qcompiler.check import relative_error
from qcompiler.formats import QFormat, pack
from qcompiler.rounding import nearest
from qcompiler.samples import random_inputs

qc = torch.ops.qc


def quantized(assign: str, module: torch.nn.Module | None = None) -> qcompiler.Program:
    torch.manual_seed(0)
    layers = torch.nn.Linear(50, 20), torch.nn.ReLU(), torch.nn.Linear(20, 30)
    passes = f"canonicalize{{optional=true}},assign{{{assign} head=same}},quantize"
    module = module or torch.nn.Sequential(*layers)
    x = torch.randint(0, 40, (4, 5)) if isinstance(module, torch.nn.Embedding) else None
    x = torch.randn(4, 50) if x is None else x
    return qcompiler.compile(module, x, passes=passes, backend="reference").program


def check(
    program: qcompiler.Program, folder: Path, allowed: float, **options: bool
) -> onnx.ModelProto:
    """Export, check, run in both runtimes, also on zeros; returns the file."""
    file = qcompiler.export_onnx(program, folder / "model.onnx", **options)
    onnx.checker.check_model(file, full_check=True)
    inputs = random_inputs(program.io, 3)
    for artifact in (OnnxArtifact(program, folder), OpenVinoArtifact(program, folder)):
        for feed in (inputs, tuple(torch.zeros_like(x) for x in inputs)):
            assert relative_error(program.flat(feed), artifact.run(feed)) < allowed
    return onnx.load(file)


def stored(model: onnx.ModelProto) -> set[str]:
    names = onnx.TensorProto.DataType
    return {names.Name(i.data_type) for i in model.graph.initializer} - {"INT64"}


def operators(model: onnx.ModelProto) -> set[str]:
    return {n.op_type for n in model.graph.node}


@pytest.mark.parametrize(
    ("weight", "container", "opset"),
    [
        ("int8:channel", "INT8", 18),
        ("int5:channel", "INT8", 18),
        ("uint8:channel:asym", "UINT8", 18),
        ("int6:group10", "INT8", 21),
        ("int4:channel:full", "INT4", 21),
        ("uint4:group10:asym", "UINT4", 21),
        ("int2:group10", "INT4", 21),
        ("int4:group5", "INT8", 21),  # in odd groups, OpenVINO would read wrong numbers
        ("int4:group17", "INT8", 18),  # the last group is short: spelled out
        ("int4:group18", "INT8", 18),
    ],
)
def test_weights(weight: str, container: str, opset: int, tmp_path: Path) -> None:
    model = check(quantized(f"weight={weight}"), tmp_path, 1e-6)
    assert stored(model) == {"FLOAT", *container.split()}
    assert model.opset_import[0].version == opset
    assert ("Cast" in operators(model)) == (weight in ("int4:group17", "int4:group18"))
    assert {o.domain for o in model.opset_import} == {""}


@pytest.mark.parametrize("weight", ["int8:channel", "int4:group16", "uint3:channel:asym"])
def test_embeddings(weight: str, tmp_path: Path) -> None:
    program = quantized(f"embedding={weight}", torch.nn.Embedding(40, 33))
    assert "Gather" in operators(check(program, tmp_path, 1e-6))


@pytest.mark.parametrize(
    ("activation", "operator"),
    [
        ("int8:tensor", "QuantizeLinear"),
        ("uint8:tensor:asym", "QuantizeLinear"),
        ("int4:tensor", "Clip"),
        ("uint8:tensor:asym:dynamic", "DynamicQuantizeLinear"),
        ("int8:tensor:dynamic", "Round"),
        ("int8:token:dynamic", "Round"),
        ("uint8:token:asym:dynamic", "Round"),
        ("int8:group10:dynamic", "Round"),
    ],
)
def test_activations(activation: str, operator: str, tmp_path: Path) -> None:
    """A rounding may fall the other way, by one step of 127, or of 7."""
    program = quantized(f"weight=int8:channel activation={activation}")
    model = check(program, tmp_path, 5e-2 if "int4" in activation else 3e-3)
    assert operator in operators(model)


class Integers(torch.nn.Module):
    def __init__(self, format: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.format, self.dtype = format, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, zero = qc.dynamic_scale(x, self.format)
        q = qc.quantize(x, self.format, scale, zero, self.dtype)
        return qc.dequantize_integers(q, self.format, scale, zero, torch.float32)


@pytest.mark.parametrize(
    ("format", "dtype", "operator"),
    [
        ("uint8:tensor:asym:dynamic", torch.uint8, "Round"),
        ("int8:tensor:dynamic", torch.int32, "Round"),
        ("int8:token:dynamic", torch.int8, "Round"),
    ],
)
def test_integers(format: str, dtype: torch.dtype, operator: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = qcompiler.capture(Integers(format, dtype), torch.randn(3, 7, 16))
    assert operator in operators(check(program, tmp_path, 3e-3))


def test_unsigned_weights_are_the_same_numbers(tmp_path: Path) -> None:
    program = quantized("weight=int8:channel activation=int8:tensor")
    assert stored(check(program, tmp_path, 3e-3, unsigned=True)) == {"FLOAT", "UINT8"}


@pytest.mark.parametrize(
    ("dtype", "name", "opset"),
    [
        (torch.float16, "FLOAT16", 18),
        (torch.bfloat16, "BFLOAT16", 22),
        (torch.float64, "DOUBLE", 18),
    ],
)
def test_a_program_keeps_its_types(
    dtype: torch.dtype, name: str, opset: int, tmp_path: Path
) -> None:
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(64, 5)
    )
    passes = (
        "canonicalize{optional=true},assign{weight=int8:channel activation=int8:tensor},quantize"
    )
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    compiled = qcompiler.compile(module.to(dtype), x, passes=passes, backend="reference")
    file = compiled.export(tmp_path / "model.onnx")
    onnx.checker.check_model(file, full_check=True)
    model = onnx.load(file)
    elements = onnx.TensorProto.DataType
    for value in (*model.graph.input, *model.graph.output):
        assert elements.Name(value.type.tensor_type.elem_type) == name
    assert model.opset_import[0].version == opset


class Attention(torch.nn.Module):
    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("kind", ["bool", "infinite", "lowest"])
def test_rows_of_attention_that_see_nothing(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    visible = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    visible[0, 0, 1] = False
    hidden = {"infinite": -torch.inf, "lowest": torch.finfo(torch.float32).min}.get(kind)
    mask = visible if hidden is None else torch.zeros(1, 1, 3, 3).masked_fill(~visible, hidden)
    inputs = (*torch.randn(3, 1, 2, 3, 4).unbind(), mask)
    example = (*inputs[:3], torch.zeros_like(mask))
    program = qcompiler.capture(Attention(), example)
    qcompiler.export_onnx(program, tmp_path / "model.onnx")
    for runtime in (OnnxArtifact, OpenVinoArtifact):
        found = runtime(program, tmp_path).run(inputs)
        assert relative_error(program.flat(inputs), found) < 1e-6


def test_a_batch_norm_folded_into_a_bfloat16_convolution(tmp_path: Path) -> None:
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
    module = torch.nn.Sequential(*layers).eval().bfloat16()
    program = qcompiler.capture(module, torch.randn(2, 3, 6, 6, dtype=torch.bfloat16))
    file = qcompiler.export_onnx(program, tmp_path / "model.onnx")
    onnx.checker.check_model(file, full_check=True)
    assert stored(onnx.load(file)) == {"BFLOAT16"}


class Both(torch.nn.Module):
    """One stored weight as it is, and transposed."""

    def __init__(self, format: str) -> None:
        super().__init__()
        fmt, weight = QFormat.parse(format), torch.randn(20, 20)
        q = nearest(weight, fmt)
        self.format = format
        self.register_buffer("data", pack(q.data, fmt.bits))
        self.register_buffer("scale", q.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = qc.dequantize(self.data, self.scale, None, self.format, 20, torch.float32)
        return torch.nn.functional.linear(x, w) + (x @ w).relu()


@pytest.mark.parametrize("format", ["int8:channel", "int4:group10"])
def test_a_weight_that_is_read_in_two_layouts(format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = qcompiler.capture(Both(format), torch.randn(4, 20))
    inputs = random_inputs(program.io, 3)
    for target, runtime in (("onnx", OnnxArtifact), ("openvino", OpenVinoArtifact)):
        file = qcompiler.export_onnx(program, tmp_path / "model.onnx", target=target)
        onnx.checker.check_model(file, full_check=True)
        found = runtime(program, tmp_path).run(inputs)
        assert relative_error(program.flat(inputs), found) < 1e-6
