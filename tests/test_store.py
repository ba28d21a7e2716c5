"""Saved and loaded: the same outputs and history, and a program to go on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from torch.utils import _pytree as pytree

import qcompiler
from qcompiler import BadInput
from qcompiler.codec import decode_program, encode_program
from qcompiler.io import as_call
from qcompiler.pipeline import run_pipeline
from qcompiler.registry import make_passes
from qcompiler.spaces import find


@pytest.mark.parametrize("backend", ["reference", "cpu", "null"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "cnn"])
def test_round_trip(name: str, backend: str, tmp_path: Path) -> None:
    model, example = zoo.build(name)
    args, kwargs = as_call(example)
    compiled = qcompiler.compile(model, example, recipe="w4a16", backend=backend)
    compiled.save(tmp_path / "out")
    loaded = qcompiler.load(tmp_path / "out")
    for a, b in zip(
        pytree.tree_leaves(compiled(*args, **kwargs)),
        pytree.tree_leaves(loaded(*args, **kwargs)),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert str(loaded.diff()) == str(compiled.diff())
    assert loaded.bytes == compiled.bytes


class Odd(torch.nn.Module):
    """An operator with one keyword alone, which is a type; two inputs of one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.mix(x, y, y, need_weights=False)[0].sum(1, dtype=torch.float64)


def test_dimensions_that_must_be_one_are_one(tmp_path: Path) -> None:
    """torch.export proves no equality through a view."""
    torch.manual_seed(0)
    example = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    made = qcompiler.compile(Odd(), example, recipe="w8a8-dynamic")
    assert [p.shape for p in made.program.io.ports] == [
        ("batch", "sequence", 16),
        ("batch", "sequence2", 16),
    ]
    made.save(tmp_path / "out")
    loaded = qcompiler.load(tmp_path / "out")
    for batch, first, second in ((2, 5, 7), (3, 9, 4)):
        inputs = torch.randn(batch, first, 16), torch.randn(batch, second, 16)
        assert torch.equal(loaded(*inputs), made(*inputs))
    with pytest.raises(BadInput, match=r"y: .* does not take shape .*batch = 2"):
        made(torch.randn(2, 5, 16), torch.randn(3, 7, 16))


def test_a_loaded_program_can_be_rewritten_further(tmp_path: Path) -> None:
    model, example = zoo.build("llama")
    half_way = qcompiler.compile(model, example, passes="canonicalize", backend="reference")
    half_way.save(tmp_path / "out")
    program = qcompiler.load(tmp_path / "out").program
    free = [s for s in find(program) if not s.blocked_by]
    assert len(free) == len([s for s in find(half_way.program) if not s.blocked_by])
    done = run_pipeline(program, make_passes("smooth,fold,assign,quantize"))
    assert done.history[-4].metrics["error"] < 1e-9
    assert [s.name for s in done.history] == [
        "capture", "canonicalize", "smooth", "fold", "assign", "quantize",
    ]  # fmt: skip


def test_account() -> None:
    model, example = zoo.build("llama")
    account = qcompiler.compile(
        model, example, recipe="w8a8-dynamic-smooth", backend="reference"
    ).diff()
    assert account.between(1, 3).params and not account.between(1, 3).added
    assert account.between(3, 4).precision and not account.between(3, 4).graph_changed
    weight = "model.layers.0.mlp.down_proj.weight"
    assert f"{weight} = {weight} / smooth" in account.why(weight)[-1][2]
    shown = account.show("model.layers.0.mlp.down_proj/linear#0")
    assert [name for _, name, _ in shown] == ["capture", "smooth", "fold", "assign", "quantize"]
    for step in account.steps[1:]:
        for id in (*step.diff.added, *step.diff.rewired)[:40]:
            assert account.why(id) and account.show(id)


def test_a_file_names_operators_and_nothing_else() -> None:
    model, example = zoo.build("cnn")
    program = qcompiler.capture(model, example)
    for target in ("os.system", "torch.load", "aten::no_such.default", "builtins.eval"):
        raw = encode_program(program)
        next(n for n in raw["graph"] if n["op"] == "call_function")["target"] = target
        with pytest.raises(BadInput, match="which this installation lacks"):
            decode_program(raw, program.params)
