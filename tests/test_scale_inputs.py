"""Scales at run time: exact by themselves, worth it once `smooth` has filled them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import qcompiler
from qcompiler import BadInput, Program
from qcompiler.check import relative_error
from qcompiler.pipeline import run_pipeline
from qcompiler.registry import make_passes
from qcompiler.sites import sites

W8A8 = "assign{weight=int8:channel activation=int8:token:dynamic head=same}"
SCALED = f"{W8A8},scale_inputs,smooth,fold,quantize"


class Net(nn.Module):
    """A convolution and, behind a GELU that no scale passes, two readers of one value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(8, 16, 1)
        self.up = nn.Linear(16, 32)
        self.one, self.two = nn.Linear(32, 8), nn.Linear(32, 8)
        with torch.no_grad():
            self.up.bias[3] = 60.0  # one channel is far larger than the others
            self.one.weight[:, 3] = self.two.weight[:, 3] = 0.01

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.gelu(self.up(torch.sigmoid(self.conv(x)).transpose(1, 2)))
        return self.one(y) * self.two(y)


def data(seed: int = 1) -> Tensor:
    return torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def program() -> Program:
    return qcompiler.capture(Net().eval(), data())


def run(program: Program, passes: str) -> Program:
    return run_pipeline(program, make_passes(passes), data=lambda: [(data(s),) for s in range(8)])


def test_ones_in_front_of_what_nothing_scales(program: Program) -> None:
    found = run(program, "scale_inputs")
    assert relative_error(found.flat((data(),)), program.flat((data(),))) == 0
    by_id = {s.id: s for s in sites(found.nodes)}
    first, second = by_id["one/linear#0"], by_id["two/linear#0"]
    assert first.x is second.x and first.x is not None
    assert first.x.target is torch.ops.aten.mul.Tensor
    scale = first.x.args[1]
    assert isinstance(scale, fx.Node) and torch.equal(found.tensor(scale), torch.ones(32))
    step = found.history[-1]
    assert any("gelu" in e.why for e in step.edits)
    assert {r.nodes[0]: r.why for r in step.skipped} == {
        "conv/conv1d#0": "only linears take a scale in front of them"
    }


def test_what_can_be_scaled_already_is_left_alone() -> None:
    layers = nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)
    found = run_pipeline(
        qcompiler.capture(nn.Sequential(*layers).eval(), torch.randn(4, 16)),
        make_passes("scale_inputs"),
    )
    assert [e.nodes[0] for e in found.history[-1].edits] == ["0/linear#0"]


def test_the_plan_decides(program: Program) -> None:
    found = run(program, f'{W8A8[:-1]} exceptions=["*up*=float","*one*=float"]}},scale_inputs')
    assert [e.nodes[0] for e in found.history[-1].edits] == ["two/linear#0"]
    why = {r.nodes[0]: r.why for r in found.history[-1].skipped}
    assert why["one/linear#0"] == "the plan leaves it in floating point"


def test_an_outlier_behind_a_gelu_costs_less(program: Program) -> None:
    wanted = program.flat((data(99),))
    errors = [
        relative_error(run(program, passes).flat((data(99),)), wanted)
        for passes in (f"{W8A8},quantize", SCALED)
    ]
    assert errors[1] < errors[0] / 3


def test_it_runs_and_comes_back(tmp_path: Path) -> None:
    made = qcompiler.compile(
        Net().eval(), data(), passes=SCALED, data=[data(s) for s in range(8)], backend="cpu"
    )
    made.save(tmp_path / "out")
    again, wanted = qcompiler.load(tmp_path / "out")(data()), made(data())
    assert isinstance(again, Tensor) and isinstance(wanted, Tensor)
    assert torch.equal(again, wanted)


def test_smooth_comes_after(program: Program) -> None:
    with pytest.raises(BadInput, match="'scale_inputs' must come before 'smooth'"):
        run(program, "smooth,scale_inputs")
