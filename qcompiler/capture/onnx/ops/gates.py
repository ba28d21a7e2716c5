"""Activations of recurrent operators, by the names that the standard gives them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompiler.capture.onnx.call import Call

Activation = Callable[[Tensor], Tensor]
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], list[float]]] = {
    "Sigmoid": (torch.sigmoid, []),
    "Tanh": (torch.tanh, []),
    "Relu": (torch.relu, []),
    "Softsign": (F.softsign, []),
    "Softplus": (F.softplus, []),
    "LeakyRelu": (F.leaky_relu, [0.01]),
    "Elu": (F.elu, [1.0]),
    "ThresholdedRelu": (lambda x, alpha: torch.where(x > alpha, x, 0.0), [1.0]),
    "Affine": (lambda x, alpha, beta: alpha * x + beta, [1.0, 0.0]),
    "ScaledTanh": (lambda x, alpha, beta: alpha * torch.tanh(beta * x), [1.0, 1.0]),
    "HardSigmoid": (lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0.0, 1.0), [0.2, 0.5]),
}
"""Name → function of (x, alpha, beta) and the defaults of alpha and beta, if it has them."""


def activations(call: Call, default: list[str], directions: int) -> list[list[Activation]]:
    """For each direction the functions that the node names; their inputs clipped if it says so.

    The third function of an LSTM reads the cell, and no gate; as in ONNX Runtime it is not clipped.
    """
    names = call.texts("activations", default * directions)
    if len(names) != len(default) * directions:
        raise call.refusal(f"activations are {names}; expected {len(default) * directions}")
    given = [call.floats("activation_alpha", []), call.floats("activation_beta", [])]
    clip = call.float("clip", 0.0)
    found = [
        _activation(call, name, given, clip if i % len(default) < 2 else 0.0)
        for i, name in enumerate(names)
    ]
    return [found[i : i + len(default)] for i in range(0, len(found), len(default))]


def _activation(call: Call, name: str, given: list[list[float]], clip: float) -> Activation:
    """One function; its numbers are the next ones of the attributes."""
    if name not in FUNCTIONS:
        raise call.refusal(f"activation {name!r}; expected one of {', '.join(FUNCTIONS)}")
    function, defaults = FUNCTIONS[name]
    numbers = [
        values.pop(0) if values else default
        for values, default in zip(given, defaults, strict=False)
    ]

    def apply(x: Tensor) -> Tensor:
        return function(x.clamp(-clip, clip) if clip else x, *numbers)

    return apply
