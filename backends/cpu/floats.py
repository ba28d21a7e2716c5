"""What stays in floating point, as torch does it fastest.

`torch.nn.functional.linear` makes of rows that do not lie side by side (a transposed sequence) one
product for each sample, unless the weight wants a gradient, as in training it does: up to three
times as slow. Here such rows are copied together first, as they are there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b, x (…, in)."""
    return torch.nn.functional.linear(x.contiguous() if x.ndim > 2 else x, weight, bias)


def _recurrent(operator: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """(x, …, batch_first): its products are such linears too, of x (time, batch, in)."""

    def run(x: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, ...]:
        if named or x.dtype != torch.float32:  # others have kernels of their own
            return operator(x, *arguments, **named)
        *others, batch_first = arguments
        if not batch_first:
            return operator(x.contiguous(), *others, False)
        y, *states = operator(x.transpose(0, 1).contiguous(), *others, False)
        return y.transpose(0, 1), *states

    return run


FLOATS: dict[object, object] = {
    aten.linear.default: linear,
    aten.gru.input: _recurrent(aten.gru.input),
    aten.lstm.input: _recurrent(aten.lstm.input),
}
"""Operators that are these functions."""
