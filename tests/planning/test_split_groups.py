"""Parts of a layer, each with bits of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler import BadInput, PassError
from qcompiler.passes.allocate import Allocate
from qcompiler.passes.split_groups import salience
from qcompiler.pipeline import run_pipeline
from qcompiler.registry import make_passes
from qcompiler.sites import sites

FORMATS = ("int2:group8:scale(fp16)", "int4:group8:scale(fp16)", "int8:group8:scale(fp16)")


class Net(nn.Module):
    """Some channels of its input matter, others hardly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = (
            nn.Linear(64, 32),
            nn.Linear(64, 32, bias=False),
            nn.Linear(32, 4),
        )
        self.register_buffer(
            "size", torch.logspace(0, -2, 8)[torch.randperm(8)].repeat_interleave(8)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.size
        return self.head(torch.relu(self.a(x)) + self.b(x))


def data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(32, 64) for _ in range(4)]


def run(passes: str) -> tuple[qcompiler.Program, qcompiler.Program]:
    program = qcompiler.capture(Net().eval(), data()[0])
    return program, run_pipeline(program, make_passes(passes), data=lambda: [(x,) for x in data()])


def test_the_same_function_in_parts() -> None:
    """Checked in float64 by the pipeline; readers of one input share a gather."""
    program, split = run("split_groups{group=8}")
    found = {s.id: s for s in sites(split.graph.nodes)}
    assert len(found) == 3 + 3 + 1
    widths = {id: s.weight.meta["val"].shape[1] for id, s in found.items()}
    assert [widths[f"a/linear#{n}"] for n in (1, 2, 3)] == [16, 32, 16]
    x = data()[0]
    torch.testing.assert_close(split(x), program(x))
    assert found["a/linear#1"].x is found["b/linear#1"].x


def test_the_most_salient_come_first() -> None:
    _, split = run("split_groups{group=8 shares=[0.25 0.75]}")
    size = Net().size
    first = split.params["a.part0"].long()
    assert float(size[first].mean()) > 2 * float(size.mean())


def test_salience_is_slim_llm_s() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(3, 5).double(), torch.randn(40, 5)
    gram = x.double().T @ x.double() / 40
    gram += 0.01 * gram.diagonal().mean() * torch.eye(5)
    expected = (w.square() / torch.linalg.inv(gram).diagonal().square()).sum(0)
    torch.testing.assert_close(salience(w, x), expected)


def test_parts_get_bits_of_their_own() -> None:
    passes = ["split_groups{group=8}", "fold", Allocate(budgets=("5bits",), formats=FORMATS)]
    compiled = qcompiler.compile(
        Net().eval(), data()[0], passes=[*passes, "quantize"], backend="reference", data=data()
    )
    bits = {k: s.weight.bits for k, s in compiled.program.plan.items() if s.weight is not None}
    for name in "ab":
        assert bits[f"{name}/linear#1"] > bits[f"{name}/linear#3"]


def test_refusals() -> None:
    with pytest.raises(BadInput, match="add up to 1"):
        run("split_groups{shares=[0.5 0.6]}")
    with pytest.raises(BadInput, match="group is at least 1"):
        run("split_groups{group=0}")
    with pytest.raises(PassError, match="64 channels are too few"):
        run("split_groups{group=64}")
