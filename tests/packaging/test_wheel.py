"""The installed wheel, used from another directory; `.ci/run` runs it in its own venv."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qcompiler
from qcompiler.recipe import load_recipe, recipe_names

installed = "site-packages" in str(Path(qcompiler.__file__))
pytestmark = pytest.mark.skipif(not installed, reason="for the installed wheel: .ci/run runs it")


def test_only_qcompiler_lands_in_site_packages() -> None:
    files = importlib.metadata.files("qcompiler") or []
    tops = {f.parts[0] for f in files if f.parts[0] != ".."}
    assert tops == {"qcompiler", f"qcompiler-{qcompiler.__version__}.dist-info"}


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_no_short_names(name: str) -> None:
    with pytest.raises(ImportError):
        __import__(name)


def test_all_recipes_are_packed() -> None:
    assert len(recipe_names()) == 19
    for name in recipe_names():
        assert load_recipe(name).passes()


def test_compile_save_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    x = torch.randn(4, 16)
    compiled = qcompiler.compile(model, x, recipe="w8a8-dynamic-smooth")
    want = compiled(x)
    compiled.save(tmp_path / "out")
    assert torch.equal(qcompiler.load(tmp_path / "out")(x), want)
    assert (want - model(x)).norm() / model(x).norm() < 0.05


def test_torch_compile_finds_it() -> None:
    assert "qcompiler" in torch._dynamo.list_backends()


def test_command_line() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "qcompiler"), "passes", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"canonicalize"' in done.stdout
