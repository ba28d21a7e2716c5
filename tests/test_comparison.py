"""A compiled model beside the float one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler import BadInput


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
