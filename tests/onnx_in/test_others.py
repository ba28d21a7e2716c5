"""Files that others wrote are read, run as they do under ONNX Runtime, and rewritten further."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from files import export, export_torchscript, quantize
from torch import Tensor

import qcompiler
from qcompiler.backends.onnxruntime.probe import saturates
from qcompiler.check import relative_error
from qcompiler.cli import main
from qcompiler.errors import QCompilerError
from qcompiler.program import Program
from qcompiler.registry import get_backend
from qcompiler.samples import random_inputs
from qcompiler.sites import sites

qc = torch.ops.qc
TOOLS = ("QDQ", "QOperator", "dynamic", "dynamic uint8", "nbits 4", "nbits 8")
FILES = [(name, how) for how in TOOLS for name in ("bert", "resnet")]
FILES = [
    ("vit", how) if name == "resnet" and "nbits" in how else (name, how) for name, how in FILES
]
INTEGERS = {"MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "QGemm"}
QUANTIZED = {qc.dequantize.default, qc.dequantize_integers.default, qc.fake_quantize.default}


def run_exactly(path: Path, program: Program, inputs: tuple[object, ...]) -> tuple[Tensor, ...]:
    """The file under ONNX Runtime as it is written: nothing fused, nothing saturating. On a CPU
    where integer operators saturate, it takes an optimization to make them exact."""
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    mended = saturates() and any(n.op_type in INTEGERS for n in _nodes(path))
    options.graph_optimization_level = (
        levels.ORT_ENABLE_EXTENDED if mended else levels.ORT_DISABLE_ALL
    )
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    named = zip(program.io.ports, inputs, strict=True)
    feed = {p.name: x.numpy() for p, x in named if isinstance(x, Tensor)}
    return tuple(torch.from_numpy(y) for y in session.run(None, feed))


@pytest.mark.parametrize(("name", "how"), FILES)
def test_quantized_by_onnxruntime(name: str, how: str, tmp_path: Path) -> None:
    source, path = tmp_path / "float.onnx", tmp_path / "quantized.onnx"
    export(name, source, opset=20 if "nbits" not in how else 21)
    exact = qcompiler.capture(source)
    batches = [random_inputs(exact.io, seed) for seed in range(4)]
    named = [{p.name: x.numpy() for p, x in zip(exact.io.ports, b, strict=True)} for b in batches]
    quantize(how, source, path, named)

    program = qcompiler.capture(path)
    inputs = random_inputs(program.io, 5)
    want, found = run_exactly(path, program, inputs), program.flat(inputs)
    rounding = relative_error(exact.flat(inputs), want)
    # A last bit that turns a rounding the other way costs as much as rounding, elsewhere nothing.
    assert relative_error(want, found) <= max(0.3 * rounding, 1e-5)

    adopted = qcompiler.compile(path, passes="canonicalize{optional=true},adopt", backend="cpu")
    assert relative_error(found, adopted.artifact.run(inputs)) <= max(0.3 * rounding, 1e-4)
    plan = adopted.program.plan
    assert sum(s.weight is not None for s in plan.values()) >= 8

    again = qcompiler.compile(
        path,
        passes="canonicalize{optional=true},unquantize{optional=true},smooth{optional=true},"
        "fold{optional=true},assign{weight=int8:channel activation=int8:token:dynamic},quantize",
        backend="reference",
        data=[b for b in batches],
    )
    stored = [s for s in sites(again.program.nodes) if s.id in again.program.plan]
    assert stored and all(s.weight.target is not qc.dequantize_integers.default for s in stored)
    assert relative_error(found, again.artifact.run(inputs)) <= 2 * rounding + 0.05


HALF = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4, 6, 4] x) => (float[N, 6] y, float[N, 16, H, W] e) {
q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) w = DequantizeLinear(codes, t)
e = Conv <pads = [1, 1, 1, 1]> (d, w) f = Flatten(e) h = MatMul(f, v) r = Relu(h)
y = MatMul(r, u) }"""
"""Its convolution is quantized, its linears are not."""


def half_quantized(path: Path) -> Path:
    generator = np.random.default_rng(0)
    model = onnx.parser.parse_model(HALF)
    values = {
        "s": np.float32(0.03),
        "z": np.uint8(120),
        "codes": generator.integers(-60, 61, (16, 4, 3, 3)).astype(np.int8),
        "t": np.float32(0.01),
        "v": generator.standard_normal((384, 16)).astype(np.float32),
        "u": generator.standard_normal((16, 6)).astype(np.float32),
    }
    for name, value in values.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("activation", ["int8:token:dynamic", "float"])
def test_the_plan_leaves_out_what_a_file_has_quantized(activation: str, tmp_path: Path) -> None:
    path = half_quantized(tmp_path / "half.onnx")
    exact = qcompiler.capture(path)
    passes = f"canonicalize,assign{{weight=int8:channel activation={activation}}},quantize"
    made = qcompiler.compile(path, passes=passes, backend="cpu")
    assert [*made.program.plan] == ["MatMul_h/linear#0"]
    scales = [float(v) for k, v in made.program.params.items() if k.startswith("s.")]
    assert scales == [pytest.approx(0.03)]
    inputs = random_inputs(exact.io, 5)
    _, want = run_exactly(path, exact, inputs)
    assert relative_error((want,), (made.artifact.run(inputs)[1],)) <= 1e-5
    both = qcompiler.compile(path, passes=f"{passes},adopt", backend="cpu")
    assert len(both.program.plan) == 2


def test_a_rounding_that_the_plan_does_not_know_stays(tmp_path: Path) -> None:
    """A kernel for weights alone would take the rounding of a file's activation for its own."""
    path = tmp_path / "half.onnx"
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 64] x) => (float[N, 32] y) '
        "{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, w) }"
    )
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    for name, value in {"s": np.float32(0.03), "z": np.uint8(120), "w": weight}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    onnx.save(model, path)
    backend = get_backend("cpu")
    backend.kernels = frozenset({"packed8"})
    passes = "canonicalize,assign{weight=int8:channel head=same},quantize"
    made = qcompiler.compile(path, passes=passes, backend=backend)
    inputs = random_inputs(made.program.io, 5)
    assert relative_error(made.program.flat(inputs), made.artifact.run(inputs)) <= 1e-5


@pytest.mark.parametrize("pipeline", ["{}", "canonicalize,adopt,quantize"])
def test_what_is_quantized_already_says_so(pipeline: str, tmp_path: Path) -> None:
    path = tmp_path / "whole.onnx"
    half = onnx.load(half_quantized(path))
    del half.graph.node[4:], half.graph.output[0]
    onnx.save(half, path)
    passes = "canonicalize,assign{weight=int8:channel head=same},quantize"
    with pytest.raises(QCompilerError, match=r"already; .*canonicalize,adopt.*unquantize"):
        qcompiler.compile(path, passes=pipeline.replace("{}", passes), backend="reference")


@pytest.mark.parametrize("opset", [11, 13, 17])
@pytest.mark.parametrize("name", ["bert", "vit", "resnet"])
def test_exported_by_torchscript(name: str, opset: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model, example = export_torchscript(name, path, opset)
    program = qcompiler.capture(path)
    inputs = random_inputs(program.io, 5)
    with torch.no_grad():
        want = model(**dict(zip(example, inputs, strict=True))).logits
    assert relative_error((want,), program.flat(inputs)) <= 1e-5

    out = tmp_path / "out"
    runner = CliRunner()
    args = ["compile", str(path), "--recipe", "w8a8-dynamic", "--backend", "reference"]
    made = runner.invoke(main, [*args, "-o", str(out)])
    assert made.exit_code == 0, made.output
    shown = runner.invoke(main, ["diff", str(path), str(out), "--json"])
    assert shown.exit_code == 0, shown.output
    change = json.loads(shown.output)
    names = {node.name for node in _nodes(path)}
    changed = {id for id in (*change["rewired"], *change["removed"]) if "#" in id}  # no parameters
    assert changed and {id.rpartition("/")[0] for id in changed} <= names
    assert change["precision"]


def _nodes(path: Path) -> list:
    return list(onnx.load(path).graph.node)
