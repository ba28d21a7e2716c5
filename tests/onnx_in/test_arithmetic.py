"""Arithmetic, reductions and fused operators against ONNX Runtime, where node tests do not reach.

Each case is a small graph in ONNX's text form, captured and run on other sizes than the example's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import qcompiler

HEAD = '<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
CASES: dict[str, tuple[int, str]] = {
    "clip without bounds": (9, "(float[n, 6] x) => (float[n, 6] y) { y = Clip(x) }"),
    "clip with one": (9, "(float[n, 6] x) => (float[n, 6] y) { y = Clip <max = 0.5> (x) }"),
    "number divided by integers": (
        17,
        "(float[n, 6] x) => (int64[n, 6] y) { c = Constant <value_int = -700> () "
        "e = Exp(x) h = Constant <value_float = 9.0> () k = Mul(e, h) o = Ceil(k) "
        "i = Cast <to = 7> (o) y = Div(c, i) }",
    ),
    "number to a power": (
        17,
        "(float[n, 6] x) => (float[n, 6] y) { c = Constant <value_float = 2.0> () y = Pow(c, x) }",
    ),
    "mean of integers": (
        11,
        "(float[n, 6] x) => (int32[n, 1] y) { a = Exp(x) i = Cast <to = 6> (a) "
        "y = ReduceMean <axes = [1]> (i) }",
    ),
    "product of integers": (
        11,
        "(float[n, 6] x) => (int32[n, 1] y) { a = Exp(x) i = Cast <to = 6> (a) "
        "y = ReduceProd <axes = [1]> (i) }",
    ),
    "length of integers": (
        11,
        "(float[n, 6] x) => (int32[n, 1] y) { a = Exp(x) i = Cast <to = 6> (a) "
        "y = ReduceL2 <axes = [1]> (i) }",
    ),
    "as many of the largest as rows": (
        13,
        "(float[n, 6] x) => (float[n, k] y) { s = Shape(x) z = Constant <value_ints = [0]> () "
        "k = Gather(s, z) y, places = TopK(x, k) }",
    ),
    "as many classes as rows": (
        13,
        "(float[n, 6] x) => (float[n, 6, k] y) { s = Shape(x) z = Constant <value_int = 0> () "
        "k = Gather(s, z) i = Cast <to = 7> (x) v = Constant <value_floats = [0.0, 2.0]> () "
        "y = OneHot(i, k, v) }",
    ),
    "range in float64": (
        13,
        "(float[n, 6] x) => (double[n, 6] y) { d = Cast <to = 11> (x) "
        "a = Constant <value = double {0.1}> () b = Constant <value = double {1.8}> () "
        "c = Constant <value = double {0.3}> () r = Range(a, b, c) y = Mul(d, r) }",
    ),
    "sum and norm, default epsilon": (
        17,
        "(float[n, 6] x) => (float[n, 6] y) { c = Constant <value_float = 0.000001> () "
        "t = Mul(x, c) g = Constant <value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]> () "
        "y = com.microsoft.SkipLayerNormalization(t, t, g) }",
    ),
    "sum and root mean square": (
        17,
        "(float[n, 6] x) => (float[n, 6] y) { c = Constant <value_float = 0.000001> () "
        "t = Mul(x, c) g = Constant <value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]> () "
        "y = com.microsoft.SkipSimplifiedLayerNormalization(t, t, g) }",
    ),
    "root mean square in the default domain": (
        17,
        "(float[n, 6] x) => (float[n, 6] y) { g = Constant <value_floats = "
        "[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]> () "
        "y = SimplifiedLayerNormalization <axis = -1, epsilon = 0.00001> (x, g) }",
    ),
    "scaled product with a transposed matrix": (
        17,
        "(float[n, 6] x) => (float[n, m] y) { "
        "y = com.microsoft.FusedMatMul <alpha = 0.125, transB = 1> (x, x) }",
    ),
    "softmax over two axes": (
        11,
        "(float[n, 6] x) => (float[n, 3, 2] y) { s = Constant <value = int64[3] {-1, 3, 2}> () "
        "r = Reshape(x, s) y = Softmax <axis = 1> (r) }",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_as_onnx_runtime(name: str, tmp_path: Path) -> None:
    opset, body = CASES[name]
    path = tmp_path / "case.onnx"
    onnx.save(onnx.parser.parse_model(HEAD.format(opset=opset) + "g " + body), path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    first, second = (torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (4, 5))
    program = qcompiler.capture(path, first)
    for x in (first, second):
        (want,) = session.run(None, {"x": x.numpy()})
        (have,) = program(x).values()
        assert have.numpy().dtype == want.dtype
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)


def test_an_operator_in_the_wrong_domain_and_data_elsewhere(tmp_path: Path) -> None:
    """As ONNX Runtime's optimizer writes decoders."""
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 6] x) => (float[n, 6] y) '
        "{ y = SimplifiedLayerNormalization <axis = -1, epsilon = 0.00001> (x, g) }"
    )
    model, path = onnx.parser.parse_model(text), tmp_path / "case.onnx"
    gain = np.arange(1, 7, dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(gain, "g"))
    onnx.save(model, path, save_as_external_data=True, location="data.bin", size_threshold=0)
    x = torch.randn(4, 6)
    (want,) = ort.InferenceSession(path).run(None, {"x": x.numpy()})
    (have,) = qcompiler.capture(path).flat((x,))
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)


def test_a_cast_to_strings_is_refused_with_the_node(tmp_path: Path) -> None:
    path = tmp_path / "case.onnx"
    text = "g (float[n] x) => (string[n] y) { [words] y = Cast <to = 8> (x) }"
    onnx.save(onnx.parser.parse_model(HEAD.format(opset=17) + text), path)
    with pytest.raises(qcompiler.BadInput, match=r"\(Cast\): casts to STRING"):
        qcompiler.capture(path, torch.zeros(3))
