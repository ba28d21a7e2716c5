"""Sums behind convolutions as sites: what is rounded there, and what it buys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.check import relative_error
from qcompiler.errors import BackendError
from qcompiler.program import node_id
from qcompiler.registry import get_backend
from qcompiler.sums import sums

UINT8 = "uint8:tensor:asym"
fake_quantize = torch.ops.qc.fake_quantize.default


class Residual(nn.Module):
    """A stem with a pool, and two blocks with a sum each, one of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.side = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.convs[1](self.convs[0](x).relu())
        x = (y + x).relu()
        y = self.convs[3](self.convs[2](x).relu())
        x = (y + self.side(x)).relu()
        return self.head(x.mean((2, 3)))


def compiled(backend: str, options: str = f"activation={UINT8} sum={UINT8}") -> qcompiler.Compiled:
    data = [torch.randn(4, 3, 18, 18, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    assign = f"assign{{{options}}}"
    passes = f"canonicalize{{optional=true}},fold{{optional=true}},{assign},quantize"
    return qcompiler.compile(Residual(), data[0], passes=passes, data=data, backend=backend)


def test_addends_are_rounded_once_and_as_calibrated() -> None:
    program = compiled("reference").program
    found = sums(program.nodes)
    assert not found  # no addend is a bare convolution any more
    adds = [n for n in program.nodes if n.target is torch.ops.aten.add.Tensor]
    assert len(adds) == 2
    for add in adds:
        assert program.plan[node_id(add)].activation is not None
        assert all(a.target is fake_quantize for a in add.args)
    # what convolutions and the sum read is one tensor, rounded once
    shared = next(a for a in adds[0].args if len(a.users) == 2)
    assert {u.target for u in shared.users} == {
        torch.ops.aten.add.Tensor,
        torch.ops.aten.conv2d.default,
    }


def test_without_the_option_nothing_changes_there() -> None:
    program = compiled("reference", f"activation={UINT8}").program
    assert len(sums(program.nodes)) == 2
    assert not any("add" in id for id in program.plan)


def test_a_model_without_sums_says_so() -> None:
    x = torch.randn(2, 3, 8, 8)
    passes = f"canonicalize{{optional=true}},assign{{activation={UINT8} sum={UINT8}}},quantize"
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    made = qcompiler.compile(model, x, passes=passes, data=[x], backend="reference")
    assert "`sum` rounds nothing" in str([s.notes for s in made.program.history])


def test_onnxruntime_keeps_integers_between_convolutions(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    made, plain = compiled("onnxruntime"), compiled("onnxruntime", f"activation={UINT8}")
    kernels = [k for k in made.artifact.kernels.values() if "Conv" in k]
    assert kernels == ["QLinearConv"] * 6
    assert "float Conv" in plain.artifact.kernels.values()
    x = torch.randn(2, 3, 18, 18)
    want = made.program.flat((x,))
    assert relative_error(want, made.artifact.run((x,))) < 1e-2  # last bits may become steps
    made.save(tmp_path / "made")
    assert torch.equal(qcompiler.load(tmp_path / "made")(x), made(x))


@pytest.mark.parametrize("backend", ["cpu", "openvino"])
def test_other_backends_compute_the_same(backend: str) -> None:
    if reason := get_backend(backend).available():
        pytest.skip(reason)
    made = compiled(backend)
    x = torch.randn(2, 3, 18, 18)
    assert relative_error(made.program.flat((x,)), made.artifact.run((x,))) < 1e-2


def test_files_that_cannot_say_it_refuse() -> None:
    program = compiled("reference", f"weight=float sum={UINT8}").program
    with pytest.raises(BackendError, match="attention or sums are rounded"):
        get_backend("checkpoint").check(program)


class Behind(nn.Module):
    """Positions counted from behind a cache of any length, as a step of decoding counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(64, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        position = torch.arange(x.shape[1]) + past.shape[1]
        return self.linear(x + self.table(position)) + past.mean()


def test_a_length_that_is_added_is_no_sum() -> None:
    x, past = torch.randn(1, 1, 32), torch.randn(1, 9, 32)
    made = qcompiler.compile(
        Behind().eval(), (x, past), passes="assign{weight=int8:channel head=same},quantize",
        backend="reference", dynamic={"past": {1: "past"}},
    )  # fmt: skip
    assert not sums(made.program.nodes)
    assert made(x, torch.randn(1, 17, 32)).shape == (1, 1, 32)
