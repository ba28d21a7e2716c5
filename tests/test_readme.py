"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

import qcompiler
import qcompiler.cli
from qcompiler.pipeline import run_pipeline
from qcompiler.registry import make_passes

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
PASSES = (Path(__file__).parents[1] / "docs" / "passes.md").read_text("utf-8")


def block(word: str, text: str = README) -> dict[str, object]:
    """Names defined by the Python block that contains `word`."""
    code = next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if word in b)
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec", dont_inherit=True), names)
    return names


class TwiceNegated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.neg(torch.neg(self.a(x))))


def test_the_pass() -> None:
    drop = block("DropDoubleNegation")["DropDoubleNegation"]
    model, x = TwiceNegated().eval(), torch.randn(3, 8)
    rest = "fold{optional=true},assign{head=same},quantize"
    passes = ("canonicalize{optional=true}", drop(), *rest.split(","))
    compiled = qcompiler.compile(model, x, passes=passes)
    step = next(s for s in compiled.history if s.name == "drop_double_negation")
    assert len(step.edits) == 1 and step.metrics["error"] == 0
    assert "neg" not in str(compiled.program)
    error = (compiled(x) - model(x)).norm() / model(x).norm()
    assert 0 < error < 0.02


def test_the_pass_that_moves_a_scale() -> None:
    equal = block("EqualRows", PASSES)["EqualRows"]
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(),
        torch.randn(3, 8),
    )
    program = run_pipeline(qcompiler.capture(model, x), (equal(), *make_passes("fold")))
    assert program.history[1].edits[0].why == "rows of 0.weight of one size"
    rows = program.params["0.weight"].abs().amax(1)
    assert torch.allclose(rows, torch.ones_like(rows), rtol=1e-5)
    torch.testing.assert_close(program(x), model(x))


def test_the_front_door(tmp_path: Path) -> None:
    tiny = str(Path(__file__).parents[1] / "examples" / "tiny_llama" / "model")
    text = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "compiled.save" in b)
    names = {"ids": torch.arange(6).reshape(1, 6)}
    code = text.replace('"examples/tiny_llama/model"', repr(tiny))
    exec(code.replace('"out"', repr(str(tmp_path / "out"))), names)
    assert names["logits"].shape[:2] == (1, 6)
    again = qcompiler.load(tmp_path / "out")
    assert torch.equal(again(input_ids=names["ids"]).logits, names["logits"])
    code = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "writer = " in b)
    exec(code.replace('"examples/tiny_llama/model"', repr(tiny)), names)
    assert names["ids"].shape == (1, 46)
    assert names["out"].past_key_values[0][0].shape[2] == 47
    for command in re.findall(r"^    \.venv/bin/qcompiler ([\w-]+)", README, re.M):
        assert command in qcompiler.cli.main.commands
