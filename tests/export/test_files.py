"""What a file keeps of the program, and how it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

import qcompiler
from qcompiler.backends.onnxruntime.session import OnnxArtifact
from qcompiler.backends.openvino.session import OpenVinoArtifact
from qcompiler.cli import main
from qcompiler.export import write
from qcompiler.program import node_id

Captured = Callable[..., tuple[torch.nn.Module, object, qcompiler.Program]]


class Outputs(torch.nn.Module):
    """Outputs that appear twice, are inputs, weights or no tensors, and have an input's name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        y = x @ self.weight
        return {"y": y, "weight": self.weight, "x": x, "n": [y, y + 1], "none": None}


def test_every_output_has_a_name_of_its_own(tmp_path: Path) -> None:
    program = qcompiler.capture(Outputs(), torch.randn(2, 4))
    assert program.io.output_names == ("y", "weight", "x.out", "n.0", "n.1", "none")
    file = qcompiler.export_onnx(program, tmp_path / "model.onnx")
    onnx.checker.check_model(file, full_check=True)
    names = [o.name for o in onnx.load(file).graph.output]
    assert names == ["y", "weight", "x.out", "n.0", "n.1"]
    x = torch.randn(3, 4)
    found, wanted = OnnxArtifact(program, tmp_path).run((x,)), program.flat((x,))
    assert found[5] is None
    torch.testing.assert_close(found[:5], wanted[:5])


def test_names_sizes_ids_and_metadata(captured: Captured, tmp_path: Path) -> None:
    _, _, program = captured("bert")
    model = onnx.load(qcompiler.export_onnx(program, tmp_path / "model.onnx"))
    shapes = {
        i.name: tuple(d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim)
        for i in model.graph.input
    }
    assert shapes == {p.name: p.shape for p in program.io.tensors}
    assert [o.name for o in model.graph.output] == ["last_hidden_state", "pooler_output"]
    batch = model.graph.output[0].type.tensor_type.shape.dim[0].dim_param
    assert batch in program.io.dims
    ids = {p.value for n in model.graph.node for p in n.metadata_props if p.key == "qcompiler.id"}
    assert ids <= {node_id(n) for n in program.nodes}
    assert {i for i in program.by_id if "layer_norm" in i or "linear" in i} <= ids
    weights = {i.name for i in model.graph.initializer}
    assert {n for n in program.params if n.endswith("bias")} <= weights
    about = {p.key: p.value for p in model.metadata_props}
    assert about["qcompiler.target"] == "onnx" and int(about["qcompiler.bytes"]) > 0
    assert model.producer_name == "qcompiler"


def test_large_weights_go_beside_the_file(
    captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, program = captured("cnn")
    monkeypatch.setattr(write, "LIMIT", 1000)
    file = qcompiler.export_onnx(program, tmp_path / "model.onnx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    onnx.checker.check_model(file, full_check=True)
    inputs = (torch.randn(2, 3, 18, 18),)
    artifact = OnnxArtifact(program, tmp_path)
    opened = OpenVinoArtifact(program, tmp_path)
    torch.testing.assert_close(opened.run(inputs), program.flat(inputs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(artifact.run(inputs), program.flat(inputs), rtol=1e-5, atol=1e-5)
    (saved := tmp_path / "saved").mkdir()
    artifact.save(saved)
    assert (saved / "model.onnx.data").exists()


def test_a_failure_leaves_the_old_file(
    captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, program = captured("cnn")
    file = tmp_path / "model.onnx"
    file.write_text("old")

    def full(model: object, path: Path, external_data: object) -> None:
        path.write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr(write.ir, "save", full)
    with pytest.raises(OSError, match="no space"):
        qcompiler.export_onnx(program, file)
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("target", ["cpu", "nonsense"])
def test_a_target_without_a_dialect_is_named(target: str, captured: Captured) -> None:
    with pytest.raises(qcompiler.BadInput, match=f"'{target}'.*onnx, onnxruntime, openvino"):
        qcompiler.export_onnx(captured("cnn")[2], "model.onnx", target=target)


def test_no_folder_to_write_to(captured: Captured, tmp_path: Path) -> None:
    with pytest.raises(qcompiler.BadInput, match="does not exist"):
        qcompiler.export_onnx(captured("cnn")[2], tmp_path / "nowhere" / "model.onnx")
    with pytest.raises(qcompiler.BadInput, match="is a folder"):
        qcompiler.export_onnx(captured("cnn")[2], tmp_path)


def test_the_command(tmp_path: Path) -> None:
    passes = "canonicalize{optional=true},assign{weight=int4:group16 head=same},quantize"
    module, x = torch.nn.Linear(48, 20), torch.randn(4, 48)
    compiled = qcompiler.compile(module, x, passes=passes, backend="reference")
    folder, file = compiled.save(tmp_path / "out"), tmp_path / "model.onnx"
    for target, domains in (
        ("onnx", {""}),
        ("openvino", {""}),
        ("onnxruntime", {"", "com.microsoft"}),
    ):
        arguments = ["export", str(folder), "-o", str(file), "--target", target, "--json"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        told = json.loads(result.output)
        assert (told["target"], told["opset"]) == (target, 21)
        assert {o.domain for o in onnx.load(file).opset_import} == domains
    result = CliRunner().invoke(main, ["export", str(folder), "-o", str(file), "--target", "cpu"])
    assert result.exit_code == 2


def test_the_command_leaves_files_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: object) -> str:
        result = CliRunner().invoke(main, ["export", *map(str, words)])
        assert result.exit_code == 2, result.output
        return " ".join(result.output.split())

    module, x = torch.nn.Linear(48, 20), torch.randn(4, 48)
    compiled = qcompiler.compile(module, x, passes="canonicalize{optional=true}")
    source, other = compiled.export(tmp_path / "source.onnx"), tmp_path / "other.onnx"
    before = source.read_bytes()
    assert "source.onnx is what" in refused(source, "-o", source)
    for foreign in (b"thesis", b""):
        other.write_bytes(foreign)
        assert "is no file that export wrote" in refused(source, "-o", other)
        assert other.read_bytes() == foreign
    other.unlink()

    def denied(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(write.tempfile, "TemporaryDirectory", denied)
    assert "cannot be written: Permission denied" in refused(source, "-o", other)
    assert source.read_bytes() == before


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_artifacts_come_back(backend: str, tmp_path: Path) -> None:
    passes = "canonicalize{optional=true},assign{weight=int4:group16 head=same},quantize"
    module, x = torch.nn.Linear(48, 20), torch.randn(4, 48)
    compiled = qcompiler.compile(module, x, passes=passes, backend=backend)
    again = qcompiler.load(compiled.save(tmp_path / "out"))
    assert again.artifact.bytes == compiled.artifact.bytes
    torch.testing.assert_close(again(x[:3]), compiled.program(x[:3]), rtol=1e-5, atol=1e-5)
    again.save(tmp_path / "out")  # over the file that it runs from
    torch.testing.assert_close(again(x[:2]), compiled(x[:2]))


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        ("weight=int8:channel activation=int8:token:dynamic", "--unsigned"),
        ("weight=int8:channel", "matmulnbits_accuracy_level"),
        ("weight=int4:group32 activation=int8:token:dynamic", ""),
        ("weight=fp8_e4m3:channel", ""),
        ("weight=int8:channel activation=int16:token:dynamic", ""),
    ],
)
def test_export_says_what_runtimes_make_of_the_file(
    formats: str, words: str, tmp_path: Path
) -> None:
    model = torch.nn.Linear(64, 64)
    passes = f"assign{{{formats} head=same}},quantize"
    made = qcompiler.compile(model, torch.randn(4, 64), passes=passes)
    folder, file = made.save(tmp_path / "out"), tmp_path / "model.onnx"
    shown = CliRunner().invoke(main, ["export", str(folder), "-o", str(file)]).output
    assert shown.count("note: ") == bool(words) and words in shown
    given = ["export", str(folder), "-o", str(tmp_path / "u.onnx"), "--unsigned", "--json"]
    notes = json.loads(CliRunner().invoke(main, given).stdout)["notes"]
    assert len(notes) == ("matmulnbits" in words)


@pytest.mark.parametrize("counts", [(4,), (5,), (5, 3)])
def test_pooling_to_a_number_of_pieces_at_any_size(counts: tuple[int, ...], tmp_path: Path) -> None:
    """Where sizes are symbols torch's exporter writes other numbers."""
    conv, pool = (
        (torch.nn.Conv1d, torch.nn.AdaptiveAvgPool1d)
        if len(counts) == 1
        else (torch.nn.Conv2d, torch.nn.AdaptiveAvgPool2d)
    )
    model = torch.nn.Sequential(conv(3, 4, 3, padding=1), pool(counts)).eval()
    axes = {0: "b", 2: "h", 3: "w"} if len(counts) == 2 else {0: "b", 2: "n"}
    x = torch.randn(2, 3, *(16 for _ in counts))
    program = qcompiler.capture(model, x, dynamic={"input": axes})
    qcompiler.export_onnx(program, file := tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(file)
    for size in (16, 21, 7):
        y = torch.randn(1, 3, *(size + i for i in range(len(counts))))
        (found,) = session.run(None, {session.get_inputs()[0].name: y.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), program(y), rtol=1e-4, atol=1e-5)
