"""Backends of other packages: the example, the skeleton, and some that are broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/my_backend"
MODEL = ROOT / "examples/tiny_llama/model"
RECIPE = (
    "--passes",
    "canonicalize,assign{weight=int8:channel activation=int8:token:dynamic},quantize",
)


def example(folder: Path) -> Path:
    """A copy of the example, for pip builds inside the folder."""
    return Path(shutil.copytree(EXAMPLE, folder / "source"))


def test_it_is_short() -> None:
    assert len((EXAMPLE / "my_backend.py").read_text().splitlines()) <= 60


def test_the_example_is_installed_found_and_conforms(environment, tmp_path: Path) -> None:
    environment.install(example(tmp_path))
    listed = json.loads(environment.qcompiler("backends", "--json"))["backends"]
    assert next(b["about"] for b in listed if b["name"] == "my_backend").startswith("a toy")
    report = json.loads(environment.qcompiler("check-backend", "my_backend", "--json", "--quick"))
    assert report["ok"] and report["claims"][0]["passed"] > 20
    assert report["claims"][0]["refused"] == 0


@pytest.mark.slow
def test_the_example_compiles_the_tiny_llama(environment, tmp_path: Path) -> None:
    environment.install(example(tmp_path))
    said = environment.qcompiler(
        "compile", str(MODEL), "-o", "out", "--backend", "my_backend", *RECIPE
    )
    assert "tiles on 28 sites" in said
    environment.run("-c", SAME)


SAME = """
import torch, qcompiler
compiled = qcompiler.load("out")
ids = torch.arange(12).reshape(1, 12)
found, wanted = (c(input_ids=ids).logits for c in (compiled, compiled.program))
error = (found - wanted).norm() / wanted.norm()
assert error < 1e-3, error
"""


def test_a_wrong_packing_is_found_and_its_claim_named(environment, tmp_path: Path) -> None:
    package = example(tmp_path)
    text = (package / "my_backend.py").read_text()
    assert text.count(".transpose(1, 2)") == 1
    (package / "my_backend.py").write_text(text.replace(".transpose(1, 2)", ".transpose(2, 3)"))
    environment.install(package)
    said = environment.qcompiler("check-backend", "my_backend", "--quick", code=1)
    assert "FAIL tiles: linear int8:channel × int8:token:dynamic" in said


def test_the_skeleton_works_as_it_is(environment, tmp_path: Path) -> None:
    environment.qcompiler("new-backend", "my_npu", "--folder", str(tmp_path / "npu"))
    environment.install(tmp_path / "npu")
    passed = environment.run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "npu/tests")
    )
    assert "2 passed" in passed


BROKEN = {
    "absent": ("absent_module:Backend", "", "No module named 'absent_module'"),
    "syntax": ("bad_syntax:Backend", "def f(:", "SyntaxError"),
    "raises": ("bad_raises:Backend", "raise OSError('no driver')", "no driver"),
    "misses": ("bad_misses:Backend", "", "has no attribute 'Backend'"),
    "number": ("bad_number:Backend", "Backend = 3", "expected a subclass"),
    "starts": (
        "bad_starts:Mine",
        "from qcompiler import Backend\nclass Mine(Backend):\n    def available(self): 1 / 0",
        "ZeroDivisionError",
    ),
    "null": ("bad_twice:Backend", "", "two providers of backend 'null'"),
}


@pytest.mark.parametrize("command", ["backends", "passes", "compile"])
def test_a_broken_entry_point_is_named_and_the_others_go_on(environment, command: str) -> None:
    environment.packages.joinpath("broken-1.dist-info").mkdir()
    info = environment.packages / "broken-1.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    lines = [f"{name} = {target}" for name, (target, _, _) in BROKEN.items()]
    (info / "entry_points.txt").write_text("[qcompiler.backends]\n" + "\n".join(lines) + "\n")
    for target, text, _ in BROKEN.values():
        if not target.startswith("absent"):
            (environment.packages / f"{target.partition(':')[0]}.py").write_text(text)
    if command == "compile":
        environment.run("-c", COMPILE)
        return
    rows = json.loads(environment.qcompiler(command, "--json"))[command]
    if command == "passes":
        assert len(rows) > 20 and not any("error" in row for row in rows)
        return
    errors = {row["name"]: row["error"] for row in rows if "error" in row}
    for name, (_, _, words) in BROKEN.items():
        assert words in errors[name]
    assert "reference" in {row["name"] for row in rows} - errors.keys()
    said = environment.qcompiler("check-backend", "raises", code=2)
    assert "fails to import: OSError: no driver" in said


COMPILE = """
import torch, qcompiler
model, x = torch.nn.Sequential(torch.nn.Linear(16, 8)).eval(), torch.randn(4, 16)
qcompiler.compile(model, x, passes="assign{head=same},quantize", backend="reference")
"""
