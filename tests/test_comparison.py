"""A compiled model beside the float one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler import BadInput
from qcompiler.agreement import check_artifact
from qcompiler.errors import BackendError
from qcompiler.registry import get_backend


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.layer(x) if scale is None else self.layer(x) * scale
        return y, y.argmax(-1)


def test_errors_and_times() -> None:
    torch.manual_seed(0)
    model, x = Two(), torch.randn(32, 16)
    passes = "assign{weight=int3:channel head=same},quantize"
    made = qcompiler.compile(model, x, passes=passes, backend="reference")
    found = made.compare(model, x)
    y, label = made(x)
    wanted, labels = model(x)
    assert found.errors["output"] == pytest.approx(
        float((y - wanted).norm() / wanted.norm()), rel=1e-4
    )
    assert found.errors["output_1"] == pytest.approx((label != labels).double().mean().item())
    assert found.seconds > 0 and found.speedup == found.float_seconds / found.seconds
    assert f"{found.speedup:.2f} × float speed; off by" in str(found)


def test_another_model() -> None:
    passes = "assign{weight=int8:channel head=same},quantize"
    made = qcompiler.compile(Two(), torch.randn(4, 16), passes=passes, backend="reference")
    with pytest.raises(BadInput, match="returns 2 tensors, the other one 1"):
        made.compare(nn.Linear(16, 8), torch.randn(4, 16))


class Edgy(nn.Module):
    """A last digit of its input decides much: rounding turns one way or the other."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.frac(x * 1e3)


class Off:
    """An artifact whose numbers are off by so much."""

    def __init__(self, program: qcompiler.Program, by: float) -> None:
        self.program, self.by = program, by

    def run(self, inputs: tuple[Tensor, ...]) -> tuple[object, ...]:
        return self.program.flat(tuple(x * (1 + self.by) for x in inputs))


def test_an_artifact_may_be_as_far_off_as_last_digits_make_the_program() -> None:
    """A file that was quantized before has no float program that could tell."""
    inputs = (torch.rand(64, 16, generator=torch.Generator().manual_seed(0)),)
    program = qcompiler.capture(Edgy(), inputs)
    backend = get_backend("reference")
    check_artifact(program, Off(program, 2e-6), backend, program, inputs)
    with pytest.raises(BackendError, match="differs from the reference program by"):
        check_artifact(program, Off(program, 1e-2), backend, program, inputs)
    steady = qcompiler.capture(nn.Sequential(nn.Linear(16, 4)), inputs)
    with pytest.raises(BackendError, match="differs"):
        check_artifact(steady, Off(steady, 1e-3), backend, steady, inputs)


class Bounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(1 - x)


def test_a_program_that_fails_beside_its_inputs_excuses_nothing() -> None:
    inputs = (torch.ones(8, 4),)
    program = qcompiler.capture(Bounded(), inputs)
    backend = get_backend("reference")
    with pytest.raises(BackendError, match="differs"):
        check_artifact(program, Off(program, -0.5), backend, program, inputs)
