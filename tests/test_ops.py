"""The operators of qcompiler: gradients against finite differences, straight-through rounding."""

from __future__ import annotations

import pytest
import torch

import qcompiler  # noqa: F401 (registers the operators)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_has_the_gradient_of_a_rotation(interleaved: bool) -> None:
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(1, 1, 5, 4, dtype=torch.float64)
    table = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)

    def rotate(value: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.qc.rope(value, table.cos(), table.sin(), interleaved)
        return out

    assert torch.autograd.gradcheck(rotate, (x,))


def test_rounding_is_straight_through() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    rounded = torch.ops.qc.fake_quantize(x, "int4:token:dynamic")
    assert not torch.equal(rounded, x)
    weight = torch.randn_like(x)
    (grad,) = torch.autograd.grad((rounded * weight).sum(), x)
    assert torch.equal(grad, weight)
