"""Operators with windows, grids and steps, against ONNX Runtime, where the node tests do not reach.

Each case is one node, captured with open axes and run on other sizes than the example's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import qcompiler

Shape = tuple[int | str, ...]
X = ("n", 4, "h", "w")
SIZES = ({"n": 2, "h": 15, "w": 18}, {"n": 3, "h": 21, "w": 14})
"""Of the example, and of the run after it."""


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def model(
    op: str, x: Shape, constants: list[np.ndarray | None], outputs: int, opset: int, **options: Any
) -> onnx.ModelProto:
    """One node of input `x` and constants (None: left out)."""
    names = ["" if c is None else f"c{i}" for i, c in enumerate(constants)]
    stored = [
        numpy_helper.from_array(c, n)
        for c, n in zip(constants, names, strict=True)
        if c is not None
    ]
    results = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, ["x", *names], results, name="the_node", **options)
    second = (TensorProto.INT64, 4) if op == "MaxPool" else (TensorProto.FLOAT, 3)
    types = [(TensorProto.FLOAT, 4), second, (TensorProto.FLOAT, 3)]
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(r, t, rank * [None])
         for r, (t, rank) in zip(results, types[:outputs], strict=True)], stored,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def agree(proto: onnx.ModelProto, folder: Path, shape: Shape, dynamic: bool = True) -> None:
    path = folder / "one.onnx"
    onnx.save(proto, path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = [
        torch.randn([n if isinstance(n, int) else sizes[n] for n in shape],
                    generator=torch.Generator().manual_seed(1))
        for sizes in SIZES
    ]  # fmt: skip
    program = qcompiler.capture(path, inputs[0])
    for x in inputs if dynamic else inputs[:1]:
        found = program.flat((x,))
        for want, have in zip(session.run(None, {"x": x.numpy()}), found, strict=True):
            assert want.shape == tuple(have.shape)
            np.testing.assert_allclose(have.numpy(), want, rtol=1e-4, atol=1e-5)


PADS = (
    {"auto_pad": "SAME_UPPER", "strides": [2, 3]},
    {"auto_pad": "SAME_LOWER", "strides": [2, 1]},
    {"auto_pad": "VALID"},
    {"pads": [1, 0, 2, 1], "strides": [2, 2]},
    {"pads": [1, 1, 1, 1], "strides": [1, 2]},
)


@pytest.mark.parametrize("attributes", PADS, ids=str)
@pytest.mark.parametrize("dilations", [[1, 1], [2, 1]], ids=str)
def test_conv(attributes: dict[str, Any], dilations: list[int], tmp_path: Path) -> None:
    if "SAME" in str(attributes):
        dilations = [1, 1]  # ONNX Runtime takes no others with it
    constants: list[np.ndarray | None] = [weight(6, 2, 3, 2), weight(6)]
    proto = model("Conv", X, constants, 1, 17, group=2, dilations=dilations, **attributes)
    agree(proto, tmp_path, X)


@pytest.mark.parametrize(
    "attributes",
    [
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 3]},
        {"pads": [1, 0, 0, 1], "strides": [2, 2], "output_padding": [1, 0]},
        {"pads": [0, 0, 2, 2], "strides": [2, 2]},
        {"pads": [1, 1, 1, 1], "dilations": [2, 2]},
    ],
    ids=str,
)
def test_conv_transpose(attributes: dict[str, Any], tmp_path: Path) -> None:
    constants: list[np.ndarray | None] = [weight(4, 3, 3, 4), weight(6)]
    agree(model("ConvTranspose", X, constants, 1, 17, group=2, **attributes), tmp_path, X)


@pytest.mark.parametrize("attributes", PADS, ids=str)
@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize("kernel", [[3, 3], [4, 2]], ids=str)
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "AveragePool include", "LpPool"])
def test_pool(
    op: str, kernel: list[int], ceil: int, attributes: dict[str, Any], tmp_path: Path
) -> None:
    more: dict[str, Any] = {"count_include_pad": 1} if "include" in op else {}
    if op == "LpPool":
        more["p"] = 3
    if op == "MaxPool" and "SAME" not in str(attributes):
        more["dilations"] = [1, 2]
    name, outputs = op.split()[0], 2 if op == "MaxPool" and "VALID" not in str(attributes) else 1
    auto = "auto_pad" in attributes
    proto = model(name, X, [], outputs, 22, kernel_shape=kernel, ceil_mode=ceil * (not auto),
                  **attributes, **more)  # fmt: skip
    agree(proto, tmp_path, X)


def test_max_pool_places_column_first(tmp_path: Path) -> None:
    proto = model("MaxPool", X, [], 2, 17, kernel_shape=[2, 2], storage_order=1, strides=[2, 2])
    agree(proto, tmp_path, X)


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
def test_global_pool(op: str, tmp_path: Path) -> None:
    agree(model(op, X, [], 1, 17), tmp_path, X)


ROIS = np.array([[0, 1, 2, 9, 12], [1, 0, 0, 14, 11], [0, 4, 4, 5, 5]], np.float32)


def test_max_roi_pool(tmp_path: Path) -> None:
    proto = model("MaxRoiPool", X, [ROIS], 1, 17, pooled_shape=[3, 2], spatial_scale=0.9)
    agree(proto, tmp_path, X)


@pytest.mark.parametrize("where", ["half_pixel", "output_half_pixel"])
def test_roi_align(where: str, tmp_path: Path) -> None:
    constants: list[np.ndarray | None] = [ROIS[:, 1:], ROIS[:, 0].astype(np.int64)]
    proto = model("RoiAlign", X, constants, 1, 16, output_height=3, output_width=2,
                  sampling_ratio=3, coordinate_transformation_mode=where)  # fmt: skip
    agree(proto, tmp_path, X)


WHERE = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
SCALES = ([2, 3], [0.5, 0.7], [1.5, 1])
# With aligned corners ONNX Runtime rounds the length of a result, the standard does not.
RESIZED = [(w, s) for w in WHERE for s in (SCALES if w != "align_corners" else SCALES[:1])]


@pytest.mark.parametrize(("where", "scales"), RESIZED, ids=str)
@pytest.mark.parametrize("mode", ["linear", "cubic", "antialias"])
def test_resize(where: str, mode: str, scales: list[float], tmp_path: Path) -> None:
    more: dict[str, Any] = {"mode": mode}
    if mode == "antialias":
        more = {"mode": "linear", "antialias": 1, "exclude_outside": 1}
    constants: list[np.ndarray | None] = [None, np.array([1, 1, *scales], np.float32)]
    proto = model("Resize", X, constants, 1, 18, coordinate_transformation_mode=where, **more)
    agree(proto, tmp_path, X)


RESIZED = """<ir_version: 8, opset_import: ["" : 18]>
g (float[N, 2, 5, 7] x, float[M, 1, H, W] like) => (float[A, B, C, D] y) {
lead = Constant <value_ints = [0]> () two = Constant <value_ints = [2]> ()
four = Constant <value_ints = [4]> () s = Shape(x) t = Shape(like)
a = Slice(s, lead, two) b = Slice(t, two, four) sizes = Concat <axis = 0> (a, b)
y = Resize <mode = "METHOD", coordinate_transformation_mode = "align_corners"> (x, , , sizes) }"""


@pytest.mark.parametrize("mode", ["linear", "cubic", "nearest"])
def test_resize_to_the_sizes_of_another(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "sizes.onnx"
    onnx.save(onnx.parser.parse_model(RESIZED.replace("METHOD", mode)), path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    program = qcompiler.capture(path)
    for n, height, width in ((3, 9, 4), (1, 8, 6), (1, 1, 3)):
        x, like = torch.randn(n, 2, 5, 7), torch.randn(1, 1, height, width)
        (want,) = session.run(None, {"x": x.numpy(), "like": like.numpy()})
        (have,) = program.flat((x, like))
        np.testing.assert_allclose(have.numpy(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nearest", ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("sizes", [[30, 36], [7, 20]], ids=str)
def test_resize_nearest(sizes: list[int], where: str, nearest: str, tmp_path: Path) -> None:
    constants: list[np.ndarray | None] = [None, None, np.array([2, 4, *sizes])]
    proto = model("Resize", X, constants, 1, 13, mode="nearest", nearest_mode=nearest,
                  coordinate_transformation_mode=where)  # fmt: skip
    agree(proto, tmp_path, X, dynamic=False)


@pytest.mark.parametrize("op", ["Upsample", "Resize"])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_of_old(op: str, mode: str, tmp_path: Path) -> None:
    constants: list[np.ndarray | None] = [np.array([1, 1, 2, 3], np.float32)]
    opset = 9 if op == "Upsample" else 10
    agree(model(op, X, constants, 1, opset, mode=mode), tmp_path, X)


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS = (6, "n", 5)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("how", ["plain", "no bias", "late", "lengths", "clip", "relu"])
@pytest.mark.parametrize("op", list(GATES))
def test_recurrent(op: str, how: str, direction: str, tmp_path: Path) -> None:
    sides, gates, hidden = 1 + (direction == "bidirectional"), GATES[op], 4
    constants: list[np.ndarray | None] = [
        weight(sides, gates * hidden, 5), weight(sides, gates * hidden, hidden),
        None if how == "no bias" else weight(sides, 2 * gates * hidden),
    ]  # fmt: skip
    more: dict[str, Any] = {}
    if how == "late":
        more = {"linear_before_reset": 1} if op == "GRU" else {}
    if how == "lengths":
        constants += [np.array([3, 6], np.int32), weight(sides, 2, hidden)]
    if how == "clip":
        more = {"clip": 0.5}
    if how == "relu":
        names = {"LSTM": ["HardSigmoid", "Tanh", "Relu"], "GRU": ["Sigmoid", "LeakyRelu"]}
        more = {"activations": names.get(op, ["Relu"]) * sides}
    proto = model(op, STEPS, constants, 3 if op == "LSTM" else 2, 14, hidden_size=hidden,
                  direction=direction, **more)  # fmt: skip
    agree(proto, tmp_path, STEPS, dynamic=how != "lengths")


def test_recurrent_with_batch_first(tmp_path: Path) -> None:
    """ONNX Runtime computes no such layout; it is the other one, transposed."""
    constants: list[np.ndarray | None] = [weight(2, 16, 5), weight(2, 16, 4), weight(2, 32)]
    paths = [tmp_path / "first.onnx", tmp_path / "second.onnx"]
    x, results = torch.randn(6, 3, 5), []
    for layout, path in enumerate(paths):
        shape: Shape = (3, 6, 5) if layout else (6, 3, 5)
        onnx.save(model("LSTM", shape, constants, 3, 14, hidden_size=4, layout=layout,
                        direction="bidirectional"), path)  # fmt: skip
        given = x.transpose(0, 1) if layout else x
        results.append(qcompiler.capture(path, given).flat((given,)))
    (y, h, c), (yb, hb, cb) = results
    torch.testing.assert_close(yb, y.permute(2, 0, 1, 3))
    torch.testing.assert_close((hb, cb), (h.transpose(0, 1), c.transpose(0, 1)))


@pytest.mark.parametrize("clip", [None, 3.0])
def test_the_length_of_a_sequence_is_open_or_its_size_is_noted(
    clip: float | None, tmp_path: Path
) -> None:
    """Open where torch has the layer; computed step by step, it stays what it was."""
    path = tmp_path / "open.onnx"
    more = {} if clip is None else {"clip": clip}
    onnx.save(model("LSTM", ("t", "n", 5), [weight(1, 16, 5), weight(1, 16, 4)], 1, 14,
                    hidden_size=4, **more), path)  # fmt: skip
    program = qcompiler.capture(path, torch.randn(6, 3, 5))
    if clip is not None:
        assert list(program.io.dims) == ["n"]
        assert "t stays 6" in program.history[0].notes[0]
        return
    assert list(program.io.dims) == ["t", "n"] and not program.history[0].notes
    session = ort.InferenceSession(path)
    for length in (1, 9):
        x = torch.randn(length, 2, 5)
        (want,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(program.flat((x,))[0], torch.from_numpy(want))
