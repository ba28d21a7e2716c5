"""A file that cannot be captured ends in one clear message, before any work is done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler

LONGEST = 600
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def refused(path: Path) -> str:
    """The message with which `path` is refused."""
    with pytest.raises(qcompiler.BadInput) as caught:
        qcompiler.capture(path)
    text = str(caught.value)
    assert len(text) - text.count(str(path)) * len(str(path)) <= LONGEST
    return text


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    name = attributes.pop("name", f"the_{op.lower()}")
    return helper.make_node(op, inputs.split(), outputs.split(), name=name, **attributes)


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    stored: dict[str, np.ndarray] | None = None,
    shape: Sequence[int | str] = (2, 3),
    opset: int = 20,
    kind: int = FLOAT,
    rank: int = 2,
    result: int = FLOAT,
) -> Path:
    """A model of input `x` and output `y`."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", result, [None] * rank)],
        [numpy_helper.from_array(v, n) for n, v in (stored or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


LINEAR = [node("MatMul", "x w", "a"), node("Relu", "a", "y")]
W = np.ones((3, 4), np.float32)


# --- the file -----------------------------------------------------------------------------------


def test_truncated(path: Path) -> None:
    whole = write(path, LINEAR, {"w": W}).read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        text = refused(path)
        assert "is no ONNX" in text or "is no valid ONNX model" in text
        assert str(path) in text


def test_empty(path: Path) -> None:
    path.write_bytes(b"")
    assert "no graph with outputs. Is it complete?" in refused(path)


def test_missing(path: Path) -> None:
    assert refused(path) == f"no file at {path}"


@pytest.mark.parametrize("head", [b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"GGUF", b"{'a': 1}"])
def test_wrong_magic(head: bytes, path: Path) -> None:
    path.write_bytes(head + bytes(range(256)))
    assert "is no ONNX file: expected a protobuf message (ModelProto), found" in refused(path)


def test_ten_megabytes_of_noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(10 * 2**20))
    text = refused(path)
    assert "is no ONNX file" in text and "10,485,760 bytes" in text


# --- external data ------------------------------------------------------------------------------


def write_external(path: Path, location: str, **about: int) -> Path:
    """As `write`, but the weight is said to be in the file `location`."""
    model = onnx.load(write(path, LINEAR, {"w": W}))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **about}.items():
        tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_is_read(path: Path) -> None:
    (path.parent / "weights").mkdir()
    (path.parent / "weights" / "w.bin").write_bytes(b"\0" * 16 + W.tobytes())
    program = qcompiler.capture(write_external(path, "weights/w.bin", offset=16, length=48))
    assert np.array_equal(program.params["w"].numpy(), W)


def test_missing_external_data(path: Path) -> None:
    text = refused(write_external(path, "w.bin", length=48))
    assert "the data of 'w' are missing" in text and "Copy it beside the model" in text


@pytest.mark.parametrize("how", ["../secret.bin", "a/../../secret.bin", "absolute", "link", ""])
def test_external_data_outside_of_the_folder(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(W.tobytes())
    (folder / "link").symlink_to(secret)
    location = str(secret) if how == "absolute" else how
    text = refused(write_external(folder / "model.onnx", location, length=48))
    assert repr(location) in text and "external data must lie in the folder of the model" in text


def test_a_linked_folder_outside(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "w.bin").write_bytes(W.tobytes())
    (tmp_path / "model" / "sub").symlink_to(tmp_path / "other")
    text = refused(write_external(tmp_path / "model" / "model.onnx", "sub/w.bin"))
    assert "must lie in the folder" in text


@pytest.mark.parametrize(("offset", "length"), [(0, 48), (8, 48), (2**62, 48), (0, 2**62)])
def test_short_external_data(offset: int, length: int, path: Path) -> None:
    (path.parent / "w.bin").write_bytes(W.tobytes()[:40])
    text = refused(write_external(path, "w.bin", offset=offset, length=length))
    assert f"the data of 'w' end at byte {offset + length:,}" in text and "has 40" in text


def test_external_data_that_do_not_fit_the_shape(path: Path) -> None:
    (path.parent / "w.bin").write_bytes(W.tobytes())
    text = refused(write_external(path, "w.bin", length=40))
    assert "the data of 'w' are 40 bytes" in text and "takes 48" in text


def test_external_data_without_a_length(path: Path) -> None:
    """The rest of the file is meant; here it is too short."""
    (path.parent / "w.bin").write_bytes(W.tobytes()[:40])
    text = refused(write_external(path, "w.bin"))
    assert "the data of 'w' end at byte 48" in text and "has 40" in text


@pytest.mark.parametrize("value", ["-8", "1e3", "many"])
def test_external_data_with_a_bad_offset(value: Any, path: Path) -> None:
    (path.parent / "w.bin").write_bytes(W.tobytes())
    text = refused(write_external(path, "w.bin", offset=value))
    assert f"offset {value!r}; expected" in text


def test_external_data_in_a_pipe(path: Path) -> None:
    """Reading it would wait forever."""
    os.mkfifo(path.parent / "w.bin")
    assert "the data of 'w' are missing: no file at" in refused(write_external(path, "w.bin"))


def test_external_data_of_an_attribute(tmp_path: Path) -> None:
    """A constant in a node may say the same, and is held to the same."""
    path = tmp_path / "model" / "model.onnx"
    path.parent.mkdir()
    (tmp_path / "secret.bin").write_bytes(W.tobytes())
    value = numpy_helper.from_array(W, "held")
    value.ClearField("raw_data")
    value.data_location = TensorProto.EXTERNAL
    value.external_data.add(key="location", value="../secret.bin")
    write(path, [node("Constant", "", "w", value=value), *LINEAR])
    assert "external data must lie in the folder of the model" in refused(path)


# --- the graph ----------------------------------------------------------------------------------


def test_cycle(path: Path) -> None:
    text = refused(write(path, [node("Add", "x b", "a"), node("Relu", "a", "b"),
                                node("Relu", "b", "y")]))  # fmt: skip
    assert "is no valid ONNX model" in text and "the_add" in text


def test_an_output_that_nobody_computes(path: Path) -> None:
    assert "'y'" in refused(write(path, [node("Relu", "x", "z")]))


def test_the_same_name_twice(path: Path) -> None:
    text = refused(write(path, [node("Relu", "x", "y"), node("Abs", "x", "y", name="second")]))
    assert "'y' has been used as output names multiple times" in text


def test_two_initializers_of_one_name(path: Path) -> None:
    model = onnx.load(write(path, LINEAR, {"w": W}))
    model.graph.initializer.append(numpy_helper.from_array(2 * W, "w"))
    path.write_bytes(model.SerializeToString())
    assert "w initializer name is not unique" in refused(path)


@pytest.mark.parametrize("opset", [1, 6])
def test_old_operator_set(opset: int, path: Path) -> None:
    text = refused(write(path, [node("Relu", "x", "y")], opset=opset))
    assert f"operator set {opset}; expected 7 or newer" in text and "version_converter" in text


@pytest.mark.parametrize("opset", [99, 2**40])
def test_operator_set_of_the_future(opset: int, path: Path) -> None:
    text = refused(write(path, [node("Relu", "x", "y")], opset=opset))
    assert f"operator set {opset}; the newest that onnx" in text


@pytest.mark.parametrize(
    ("op", "domain"), [("Frobnicate", ""), ("Frobnicate", "org.example"), ("Relu", "ai.onnx.ml")]
)
def test_unknown_operator(op: str, domain: str, path: Path) -> None:
    write(path, [node("Abs", "x", "a"), node(op, "a", "y", domain=domain, name="strange")])
    model = onnx.load(path)
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    path.write_bytes(model.SerializeToString())
    text = refused(path)
    assert f"does not know: {op} (domain {domain or 'ai.onnx'!r}, node 'strange');" in text


@pytest.mark.parametrize("op", ["Attention", "MultiHeadAttention", "EmbedLayerNormalization"])
def test_a_fused_operator_says_how_to_go_without(op: str, path: Path) -> None:
    write(path, [node("Abs", "x", "a"), node(op, "a", "y", domain="com.microsoft")])
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    path.write_bytes(model.SerializeToString())
    text = " ".join(refused(path).split())
    assert f"{op} (domain 'com.microsoft'" in text
    assert "take the file from before it" in text and "without fusion" in text


def _branches() -> dict[str, Any]:
    out = helper.make_tensor_value_info("b", FLOAT, [2, 3])
    graph = helper.make_graph([node("Relu", "x", "b")], "branch", [], [out])
    return {"then_branch": graph, "else_branch": graph}


def _loop() -> dict[str, Any]:
    values = [("i", INT64, []), ("c", TensorProto.BOOL, []), ("v", FLOAT, [2, 3])]
    infos = [helper.make_tensor_value_info(*v) for v in values]
    outs = [helper.make_tensor_value_info(n, k, s) for n, k, s in
            [("d", TensorProto.BOOL, []), ("w", FLOAT, [2, 3])]]  # fmt: skip
    steps = [node("Identity", "c", "d"), node("Relu", "v", "w")]
    return {"body": helper.make_graph(steps, "body", infos, outs)}


def _scan() -> dict[str, Any]:
    infos = [helper.make_tensor_value_info("v", FLOAT, [3])]
    outs = [helper.make_tensor_value_info("w", FLOAT, [3])]
    body = helper.make_graph([node("Relu", "v", "w")], "body", infos, outs)
    return {"body": body, "num_scan_inputs": 1}


@pytest.mark.parametrize("op", ["If", "Loop", "Scan"])
def test_control_flow_is_refused_before_any_work(
    op: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"If": "c", "Loop": "n c x", "Scan": "x"}[op]
    attributes = {"If": _branches, "Loop": _loop, "Scan": _scan}[op]()
    stored = {"c": np.array(True), "n": np.array(2), "unused": np.zeros(2**20, np.float32)}
    write(path, [node("Relu", "x", "z"), node(op, inputs, "y", **attributes)], stored)
    import torch

    def never(*_: object, **__: object) -> None:
        raise AssertionError("torch.export was called")

    monkeypatch.setattr(torch.export, "export", never)
    text = refused(path)
    assert f"{op} (domain 'ai.onnx', node 'the_{op.lower()}')" in text
    assert "control flow has no place" in text


SHAPES = [
    (node("MatMul", "x w", "y"), np.ones((4, 4), np.float32)),
    (node("Add", "x w", "y"), np.ones((4, 5), np.float32)),
    (node("Gemm", "x w", "y"), np.ones((2, 4), np.float32)),
    (node("Concat", "x w", "y", axis=0), np.ones((2, 4), np.float32)),
    (node("Reshape", "x w", "y"), np.array([4, 5])),
    (node("Conv", "x w", "y"), np.ones((2, 3, 3), np.float32)),
    (node("Transpose", "x", "y", perm=[0, 0]), W),
    (node("LayerNormalization", "x w", "y"), np.ones(7, np.float32)),
]


@pytest.mark.parametrize(("bad", "w"), SHAPES, ids=lambda v: getattr(v, "op_type", ""))
def test_shapes_that_do_not_fit(bad: onnx.NodeProto, w: np.ndarray, path: Path) -> None:
    text = refused(write(path, [bad], {"w": w}))
    assert bad.name in text and bad.op_type in text


def test_an_attribute_of_another_type(path: Path) -> None:
    text = refused(write(path, [node("Softmax", "x", "y", axis="last")]))
    assert "the_softmax" in text or "axis" in text


def test_strings(path: Path) -> None:
    write(path, [node("Identity", "x", "y")], kind=TensorProto.STRING, result=TensorProto.STRING)
    assert "input 'x': tensors of STRING have no counterpart" in refused(path)


def test_stored_strings(path: Path) -> None:
    write(path, [node("Identity", "w", "a"), node("Relu", "x", "y")], {"w": W})
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(helper.make_tensor("w", TensorProto.STRING, [1], [b"a"]))
    path.write_bytes(model.SerializeToString())
    assert "'w'" in refused(path)


# --- memory -------------------------------------------------------------------------------------

MANY = 2**20
TERABYTES = {
    "ConstantOfShape": ([node("ConstantOfShape", "n", "y")], {"n": np.array([MANY, MANY])}),
    "Expand": ([node("Expand", "x n", "y")], {"n": np.array([MANY, MANY, 2, 3])}),
    "Tile": ([node("Tile", "x n", "y")], {"n": np.array([MANY, MANY])}),
    "Pad": ([node("Pad", "x n", "y")], {"n": np.array([0, MANY, MANY, MANY])}),
    "Range": ([node("Range", "a b c", "y")],
              {"a": np.array(0), "b": np.array(2**40), "c": np.array(1)}),
    "Resize": ([node("Unsqueeze", "x k", "u"), node("Resize", "u r n", "y")],
               {"k": np.array([0, 1]), "r": np.zeros(0, np.float32),
                "n": np.array([1, 1, MANY, MANY], np.float32)}),
    "OneHot": ([node("Cast", "x", "i", to=INT64), node("OneHot", "i n v", "y")],
               {"n": np.array(2**40), "v": np.array([0, 1], np.float32)}),
    "EyeLike": ([node("ConstantOfShape", "n", "z"), node("EyeLike", "z", "y")],
                {"n": np.array([MANY, MANY])}),
    "HannWindow": ([node("HannWindow", "n", "y")], {"n": np.array(2**40)}),
}  # fmt: skip


@pytest.mark.parametrize("op", list(TERABYTES))
def test_a_file_that_asks_for_a_terabyte(op: str, path: Path) -> None:
    nodes, stored = TERABYTES[op]
    ranks = {"Expand": 4, "Resize": 4, "Range": 1, "OneHot": 3, "HannWindow": 1}
    kind = INT64 if op == "Range" else FLOAT
    text = refused(write(path, nodes, stored, rank=ranks.get(op, 2), result=kind))
    assert "GiB" in text and f"the_{op.lower()}" in text.lower()


def test_an_input_of_a_terabyte(path: Path) -> None:
    text = refused(write(path, [node("Relu", "x", "y")], shape=[MANY, MANY]))
    assert "'x'" in text and "GiB" in text


def most() -> int:
    """Rows of 2²⁰ numbers, of which two are more than what may be taken, and one is not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**22 // 3


def test_many_values_that_together_ask_for_too_much(path: Path) -> None:
    nodes = [node("ConstantOfShape", "n", v, name=f"of_{v}") for v in "abc"]
    nodes.append(node("Sum", "a b c", "y"))
    text = refused(write(path, nodes, {"n": np.array([most(), MANY])}))
    assert "of_b" in text and "of others; this machine can hold" in text


def test_many_inputs_that_together_ask_for_too_much(path: Path) -> None:
    model = onnx.load(write(path, [node("Add", "x z", "y")], shape=(1, 1)))
    for name in "zw":
        shape = [most(), MANY]
        model.graph.input.append(helper.make_tensor_value_info(name, FLOAT, shape))
    path.write_bytes(model.SerializeToString())
    text = refused(path)
    assert "'w'" in text and "of others" in text


def test_a_dynamic_size_that_asks_for_a_terabyte(path: Path) -> None:
    nodes = [node("Shape", "x", "s"), node("Mul", "s n", "m"), node("ConstantOfShape", "m", "y")]
    text = refused(write(path, nodes, {"n": np.array([MANY, MANY])}, shape=("batch", 3)))
    assert "the_constantofshape" in text and "GiB" in text


def test_a_thousand_doublings(path: Path) -> None:
    """Each value is twice as long as the one before it."""
    nodes = [node("Concat", f"v{i} v{i}", f"v{i + 1}", axis=0, name=f"n{i}") for i in range(1000)]
    nodes = [node("Relu", "x", "v0"), *nodes, node("Relu", "v1000", "y")]
    assert "node 'n" in refused(write(path, nodes))


def write_functions(path: Path, bodies: dict[str, list[onnx.NodeProto]]) -> Path:
    """A model that calls the first of its functions (of `a`, giving `b`), which may call others."""
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    model = onnx.load(write(path, [node(next(iter(bodies)), "x", "y", domain="own")]))
    model.opset_import.append(imports[1])
    model.functions.extend(
        helper.make_function("own", name, ["a"], ["b"], nodes, imports)
        for name, nodes in bodies.items()
    )
    path.write_bytes(model.SerializeToString())
    return path


def test_functions_that_grow_without_bound(path: Path) -> None:
    """Each calls the next one twice: 2⁴⁰ nodes in 4 kB."""
    bodies = {
        f"F{i}": [node(f"F{i + 1}", s, t, domain="own") for s, t in (("a", "c"), ("c", "b"))]
        for i in range(40)
    }
    text = refused(write_functions(path, {**bodies, "F40": [node("Relu", "a", "b")]}))
    assert f"has {2**41 + 2**40 - 1:,} nodes" in text and "inline_local_functions" in text


def test_a_function_that_calls_itself(path: Path) -> None:
    text = refused(write_functions(path, {"F": [node("F", "a", "b", domain="own")]}))
    assert "Cycle detected in model-local function references" in text


def test_control_flow_in_a_function(path: Path) -> None:
    text = refused(write_functions(path, {"F": [node("If", "a", "b")]}))
    assert "If (domain 'ai.onnx', node 'the_if')" in text
