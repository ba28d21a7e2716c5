"""Small valid files that the fuzz test starts from."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
EXTERNAL = "w.bin"
"""The file of the weights of `external`."""


def _weights(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


def _model(
    text: str, stored: dict[str, Any], shape: tuple[int | str, ...], attributes: dict
) -> onnx.ModelProto:
    """A model from lines `Operator in in -> out out`; input `x`, output the last value."""
    nodes = []
    for number, line in enumerate(text.strip().splitlines()):
        left, _, right = line.strip().partition(" -> ")
        op, *inputs = left.split()
        inputs = ["" if i == "_" else i for i in inputs]
        kind, _, tag = op.partition(":")
        name = f"{kind}.{number}"
        nodes.append(
            helper.make_node(kind, inputs, right.split(), name=name, **attributes.get(tag, {}))
        )
    graph = helper.make_graph(
        nodes, "seed", [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], FLOAT, ["o0", "o1"])],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in stored.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def mlp() -> onnx.ModelProto:
    w1, b1, w2, b2 = _weights((8, 6), (8,), (8, 4), (4,))
    text = """
        Gemm:t x w1 b1 -> a
        Sigmoid a -> s
        Mul a s -> g
        MatMul g w2 -> m
        Add m b2 -> d
        Softmax:last d -> y
    """
    stored = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    return _model(text, stored, ("batch", 6), {"t": {"transB": 1}, "last": {"axis": -1}})


def cnn() -> onnx.ModelProto:
    w1, b1, w2, gain, bias, wf = _weights((4, 3, 3, 3), (4,), (4, 1, 3, 3), (4,), (4,), (5, 4))
    text = """
        Conv:first x w1 b1 -> a
        BatchNormalization a gain bias bias one -> n
        Clip n zero six -> r
        MaxPool:pool r -> p
        Conv:depth p w2 -> c
        Resize:up c _ scales -> u
        Pad u pads -> q
        AveragePool:same q -> v
        GlobalAveragePool v -> h
        Flatten h -> f
        Gemm:t f wf -> y
    """
    stored = {
        "w1": w1, "b1": b1, "w2": w2, "gain": gain, "bias": bias, "one": np.abs(gain) + 1,
        "zero": np.float32(0), "six": np.float32(6), "wf": wf,
        "scales": np.array([1, 1, 2, 2], np.float32), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    }  # fmt: skip
    pool = {"kernel_shape": [2, 2], "strides": [2, 2]}
    attributes = {
        "first": {"strides": [2, 2], "pads": [1, 1, 1, 1]}, "pool": pool,
        "depth": {"group": 4, "auto_pad": "SAME_UPPER"}, "up": {"mode": "nearest"},
        "same": {"kernel_shape": [3, 3], "auto_pad": "SAME_LOWER"}, "t": {"transB": 1},
    }  # fmt: skip
    return _model(text, stored, (2, 3, "h", "w"), attributes)


def attention() -> onnx.ModelProto:
    """Two heads of width 4, with all the arithmetic on shapes that exporters write."""
    wq, wk, wv, wo, gain = _weights((8, 8), (8, 8), (8, 8), (8, 8), (8,))
    text = """
        LayerNormalization x gain gain -> n
        MatMul n wq -> q
        MatMul n wk -> k
        MatMul n wv -> v
        Shape x -> s
        Gather s i0 -> b0
        Gather s i1 -> t0
        Unsqueeze b0 i0v -> b
        Unsqueeze t0 i0v -> t
        Concat:zero b t heads width -> shape
        Concat:zero b t all -> back
        Reshape q shape -> qh
        Reshape k shape -> kh
        Reshape v shape -> vh
        Transpose:swap qh -> qt
        Transpose:key kh -> kt
        Transpose:swap vh -> vt
        MatMul qt kt -> scores
        Mul scores half -> scaled
        Range i0 t0 i1 -> places
        Unsqueeze places i0v -> row
        Unsqueeze places i1v -> column
        LessOrEqual row column -> seen
        Where seen scaled low -> masked
        Softmax masked -> p
        MatMul p vt -> h
        Transpose:swap h -> ht
        Reshape ht back -> m
        MatMul m wo -> o
        Add o x -> z
        ReduceMean:flat z i1v -> y
    """
    stored = {
        "wq": wq, "wk": wk, "wv": wv, "wo": wo, "gain": gain, "half": np.float32(0.5),
        "low": np.float32(-1e9), "i0": np.array(0), "i1": np.array(1), "i0v": np.array([0]),
        "i1v": np.array([1]), "heads": np.array([2]), "width": np.array([4]), "all": np.array([8]),
    }  # fmt: skip
    attributes = {
        "zero": {"axis": 0}, "swap": {"perm": [0, 2, 1, 3]}, "key": {"perm": [0, 2, 3, 1]},
        "flat": {"keepdims": 0},
    }  # fmt: skip
    return _model(text, stored, ("batch", "time", 8), attributes)


def quantized() -> onnx.ModelProto:
    (w,) = _weights((6, 8))
    text = """
        QuantizeLinear x sx zx -> xq
        DequantizeLinear xq sx zx -> xd
        DequantizeLinear:columns wq sw zw -> wd
        MatMul xd wd -> m
        Relu m -> r
        DynamicQuantizeLinear r -> rq rs rz
        MatMulInteger rq vq rz -> i
        Cast:float i -> f
        Mul f rs -> y
    """
    stored = {
        "sx": np.float32(0.02), "zx": np.uint8(120), "wq": np.round(w * 40).astype(np.int8),
        "sw": np.full(8, 0.025, np.float32), "zw": np.zeros(8, np.int8),
        "vq": np.arange(-16, 16, dtype=np.int8).reshape(8, 4),
    }  # fmt: skip
    attributes = {"columns": {"axis": 1}, "float": {"to": FLOAT}}
    return _model(text, stored, ("batch", 6), attributes)


def external() -> tuple[onnx.ModelProto, bytes]:
    """The first one with its weights in a file of their own, and what that file holds."""
    model, data = mlp(), b""
    for tensor in model.graph.initializer:
        raw = tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", EXTERNAL), ("offset", len(data)), ("length", len(raw))):
            tensor.external_data.add(key=key, value=str(value))
        data += raw
    return model, data


def seeds() -> dict[str, onnx.ModelProto]:
    return {
        "mlp": mlp(), "cnn": cnn(), "attention": attention(), "quantized": quantized(),
        "external": external()[0],
    }  # fmt: skip
