"""Bad input: one clear message, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import qcompiler
from qcompiler import BadInput, PassError, QCompilerError
from qcompiler.cli import main

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples/tiny_llama/model"
FACTORY = """
import torch

class Branch(torch.nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x

def net():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8)]
    return torch.nn.Sequential(*layers), torch.randn(4, 8)

def branch():
    return Branch(), torch.ones(2, 3)

def nothing():
    return 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a module of factories in it."""
    (tmp_path / "factories.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    return tmp_path


@pytest.fixture
def artifact(place: Path) -> Path:
    """A small compiled folder."""
    done = call("compile", "factories:net", "-o", "out", "--recipe", "w8a8-dynamic")
    assert done.exit_code == 0, done.output
    return place / "out"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def refused(*arguments: str) -> str:
    """The message of a refused command; it is the only thing that is printed."""
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return " ".join(done.output.split())


def cut(file: Path, size: int = 1000) -> None:
    with file.open("r+b") as f:
        f.truncate(size)


def copy_model(target: Path) -> Path:
    shutil.copytree(MODEL, target)
    return target


def test_no_model(place: Path) -> None:
    assert "nothing exists at that path" in refused("compile", "nowhere", "-o", "out")
    (place / "empty").mkdir()
    assert "has no config.json" in refused("compile", "empty", "-o", "out")
    assert "cannot load 'factories:nett'" in refused("compile", "factories:nett", "-o", "out")
    assert "returned int" in refused("compile", "factories:nothing", "-o", "out")
    (place / "bad.pt2").write_bytes(b"noise")
    assert "bad.pt2 is no exported program" in refused("compile", "bad.pt2", "-o", "out")
    assert not (place / "out").exists()


def test_truncated_weights(place: Path) -> None:
    folder = copy_model(place / "model")
    cut(folder / "model.safetensors")
    assert "cannot load the weights in" in refused("compile", str(folder), "-o", "out")
    assert not (place / "out").exists()


def test_config_that_does_not_match(place: Path) -> None:
    folder = copy_model(place / "model")
    config = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"num_hidden_layers": 5}, "has no weights for model.layers.4"),
        ({"intermediate_size": 640}, "another shape"),
        ({"architectures": ["NoSuchModel"]}, "has no such model"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        assert words in refused("inspect", str(folder))
    (folder / "config.json").write_text("{")
    assert "is no JSON" in refused("inspect", str(folder))


def test_refused_by_export(place: Path) -> None:
    message = refused("compile", "factories:branch", "-o", "out")
    assert "branches on the values of a tensor" in message and "torch.where" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "w8a8-dynamc"], "did you mean 'w8a8-dynamic'?"),
        (["--backend", "cpuu"], "did you mean 'cpu'?"),
        (["--passes", "canonicalise"], "did you mean 'canonicalize'?"),
        (["--passes", "smooth{alhpa=1.0}"], "did you mean 'alpha'?"),
        (["--passes", "fold", "--recipe", "w8a16"], "not both"),
        (["--recipe", "mine.toml"], "did you mean 'alpha'?"),
        (["--recipe", "keys.toml"], "did you mean 'pass'?"),
        (["--recipe", "none.toml"], "no recipe file"),
        (["--data", "none.txt"], "no data file"),
        (["--data", "empty.npy"], "holds no data"),
        (["--data", "noise.npy"], "is no .npy array"),
        (["--data", "noise.npz"], "is no .npz file"),
        (["--data", "pixels.npy"], "takes float32; found uint8. Write the values, scaled"),
        (["--data", "other.npz"], "the model's inputs are ['input']"),
        (["--data", "text.txt"], "no tokenizer.json"),
    ],
)
def test_bad_options(options: list[str], words: str, place: Path) -> None:
    import numpy as np

    (place / "mine.toml").write_text('[[pass]]\nname = "smooth"\nalpa = 1.0\n')
    (place / "keys.toml").write_text('[[passs]]\nname = "smooth"\n')
    np.save(place / "empty.npy", np.zeros((0, 8), dtype=np.float32))
    (place / "noise.npy").write_bytes(b"noise")
    (place / "noise.npz").write_bytes(b"noise")
    np.save(place / "pixels.npy", np.ones((4, 8), dtype=np.uint8))
    np.savez(place / "other.npz", x=np.ones((4, 8), dtype=np.float32))
    (place / "text.txt").write_text("words")
    assert words in refused("compile", "factories:net", "-o", "out", *options)
    assert not (place / "out").exists()


def test_empty_data_in_python() -> None:
    model = torch.nn.Linear(4, 4)
    with pytest.raises(BadInput, match="calibration data is empty"):
        qcompiler.compile(model, torch.ones(2, 4), data=[])
    with pytest.raises(BadInput, match=r"data batch 1: .*float32"):
        qcompiler.compile(model, torch.ones(2, 4), data=[torch.ones(3, 4), torch.ones(3, 5)])
    with pytest.raises(BadInput, match=r"data=\[batch\]"):
        qcompiler.compile(model, torch.ones(2, 4), data=torch.ones(2, 4))


def test_nan_in_calibration() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    data = [torch.ones(2, 4), torch.full((2, 4), float("nan"))]
    words = "NaN or infinite values at the input of 0/linear#0, in data batch 1"
    for recipe in ("w8a8-static", "w4a16-gptq"):
        with pytest.raises(BadInput, match=words):
            qcompiler.compile(model, torch.ones(2, 4), recipe=recipe, data=data)


def test_output_that_is_not_ours(place: Path) -> None:
    (place / "full").mkdir()
    (place / "full/thesis.txt").write_text("years of work")
    assert "holds other files" in refused("compile", "factories:net", "-o", "full")
    (place / "file").write_text("")
    for name in ("file", "file/sub", "file/sub/deeper"):  # before the model is even looked for
        assert "file is a file; expected a folder" in refused("compile", "none.onnx", "-o", name)
    assert "file is a file; expected a folder" in refused(
        "plan", "none.onnx", "--budget", "bytes=50%", "-o", "file/p.toml"
    )
    assert (place / "full/thesis.txt").read_text() == "years of work"


def test_no_artifact(place: Path) -> None:
    (place / "data.npy").write_bytes(b"")
    for arguments in (
        ["diff", "nowhere"],
        ["eval", "nowhere", "--data", "data.npy"],
        ["bench", "x"],
    ):
        assert "is no qcompiler artifact" in refused(*arguments)


def test_damaged_artifact(artifact: Path) -> None:
    manifest = (artifact / "qcompiler.json").read_text()
    content = artifact / json.loads(manifest)["content"]
    whole = (content / "params.safetensors").read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 0x40
    for damage in (whole[:50], bytes(flipped), b""):
        (content / "params.safetensors").write_bytes(damage)
        message = refused("diff", "out")
        assert "damaged" in message and "compile it again" in message
    (content / "params.safetensors").write_bytes(whole)
    assert call("diff", "out").exit_code == 0
    for text in ("{", "[]", '{"format": 99}', manifest.replace(content.name, "../elsewhere")):
        (artifact / "qcompiler.json").write_text(text)
        assert "out" in refused("diff", "out")


def test_a_page_in_a_file(artifact: Path) -> None:
    (artifact.parent / "file").write_text("")
    message = refused("diff", "out", "--html", "file/page.html")
    assert "file is a file; expected a folder" in message


def test_steps_and_nodes_that_are_not_there(artifact: Path) -> None:
    assert "there is no step 99; steps are 0 to" in refused("diff", "out@99")
    assert "a step is a number" in refused("diff", "out@last")
    assert "did you mean '0/linear#0'" in refused("diff", "out", "--why", "0/linaer#0")
    for option in ("--show", "--why"):
        done = call("diff", "out", option, "0/linear#0")
        assert done.exit_code == 0 and "quantize" in done.output


def test_full_disk(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(p.name for p in artifact.iterdir())
    monkeypatch.setattr("qcompiler.store.save_file", no_space)
    assert "No space left on device" in refused("compile", "factories:net", "-o", "out")
    assert "No space left on device" in refused("compile", "factories:net", "-o", "fresh")
    assert sorted(p.name for p in artifact.iterdir()) == before
    assert not (artifact.parent / "fresh").exists()
    assert call("diff", "out").exit_code == 0


SAVE_FOR_EVER = """
import sys, torch, factories, qcompiler
torch.set_num_threads(1)
model, x = factories.net()
compiled = qcompiler.compile(model, x, recipe="w8a16", backend="reference")
print("ready", flush=True)
while True:
    compiled.save(sys.argv[1])
"""


def test_a_kill_leaves_a_whole_artifact(artifact: Path) -> None:
    chance = random.Random(0)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{artifact.parent}"}
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(artifact)],
            env=environment, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0.05, 0.4))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert qcompiler.load(artifact)(torch.zeros(2, 8)).shape == (2, 8)
    call("compile", "factories:net", "-o", "out")  # and the next save cleans up
    assert len(list(artifact.glob("content-*"))) == 1


def drawing(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.dropout(x, 0.5)


class Applied(nn.Module):
    """A layer, and a function of what it makes."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor] = torch.relu) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer(x))


@pytest.mark.parametrize(
    ("model", "example", "words"),
    [
        (torch.jit.trace(nn.Linear(4, 4), torch.ones(2, 4)), None, "the nn.Module that it was"),
        (nn.Linear(4, 4, device="meta"), None, "'weight' is on the meta device and has no values"),
        (nn.Sequential(nn.LazyLinear(4)), None, "'0.weight' is not initialized yet; run the"),
        (nn.Embedding(9, 4, max_norm=1.0), None, r"max_norm=1\.0, which writes into its weight"),
        (nn.Linear(4, 4), torch.ones(2, 4, dtype=torch.complex64), r"input \[0\] is complex"),
        (nn.Linear(4, 4), torch.ones(2, 4, device="meta"), "on the meta device, without values"),
        (nn.Linear(4, 4), torch.ones(2, 4).to_sparse(), "sparse; expected dense real tensors"),
        (nn.Sequential(Applied(drawing)), None, "draws random numbers, at 0/dropout#0: equal"),
    ],
)
def test_models_and_examples_that_cannot_be(
    model: nn.Module, example: torch.Tensor | None, words: str
) -> None:
    example = torch.ones(2, 4) if example is None else example
    with pytest.raises(QCompilerError, match=words):
        qcompiler.compile(model, example, passes="canonicalize{optional=true}")


@pytest.mark.parametrize(
    ("dynamic", "words"),
    [
        ("yes", "a mapping such as .*; found 'yes'"),
        ({"x": [0]}, r"of 'x' is a mapping from axes to names, .*; found \[0\]"),
        ({"x": {0: "a b"}}, "calls a dimension 'a b'; expected a name of letters"),
        ({"x": {7: "b"}}, r"names axis 7 of 'x', which has shape \[2, 3, 4\]"),
        ({"x": {1: "s", -2: "t"}}, "names axis 1 of 'x' 's' and 't'; expected one name"),
    ],
)
def test_dynamic_that_cannot_be(dynamic: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        qcompiler.capture(Applied(), torch.ones(2, 3, 4), dynamic=dynamic)


def test_axes_may_be_counted_from_the_end() -> None:
    program = qcompiler.capture(Applied(), torch.ones(2, 3, 4), dynamic={"x": {-2: "s"}})
    assert program.io.ports[0].shape == (2, "s", 4)


def test_calls_with_tensors_without_values(capfd: pytest.CaptureFixture[str]) -> None:
    program = qcompiler.capture(Applied(), torch.ones(2, 4))
    with pytest.raises(BadInput, match="a dense tensor; found one without values, on the meta"):
        program(torch.ones(2, 4, device="meta"))
    with pytest.raises(BadInput, match="a dense tensor; found a sparse one"):
        program(torch.ones(2, 4).to_sparse())
    with pytest.raises(BadInput, match="a and b must have same reduction dim"):
        qcompiler.capture(Applied(), torch.ones(2, 5))
    assert "Traceback" not in capfd.readouterr().err


def test_a_single_layer_is_the_head() -> None:
    with pytest.raises(PassError, match=r"is taken for the head, .* write assign\{head=same\}"):
        qcompiler.compile(nn.Linear(4, 4), torch.ones(2, 4), recipe="w8a8-dynamic")
