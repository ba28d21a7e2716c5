"""Activation functions, softmax and its kin, dropout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompiler.capture.onnx.call import Call
from qcompiler.capture.onnx.table import MICROSOFT, Function, op

SIMPLE: dict[str, Callable[[Call, Tensor], Tensor]] = {
    "Relu": lambda call, x: torch.relu(x),
    "Sigmoid": lambda call, x: torch.sigmoid(x),
    "Tanh": lambda call, x: torch.tanh(x),
    "Softplus": lambda call, x: F.softplus(x),
    "Softsign": lambda call, x: F.softsign(x),
    "HardSwish": lambda call, x: F.hardswish(x),
    "Mish": lambda call, x: F.mish(x),
    "Elu": lambda call, x: F.elu(x, call.float("alpha", 1.0)),
    "Celu": lambda call, x: F.celu(x, call.float("alpha", 1.0)),
    "LeakyRelu": lambda call, x: F.leaky_relu(x, call.float("alpha", 0.01)),
    "Gelu": lambda call, x: F.gelu(x, approximate=call.text("approximate", "none")),
}


def _simple(function: Callable[[Call, Tensor], Tensor]) -> Function:
    def run(call: Call, x: Tensor) -> Tensor:
        return function(call, x)

    return run


for _name, _function in SIMPLE.items():
    op(_name)(_simple(_function))


@op("Selu")
def selu(call: Call, x: Tensor) -> Tensor:
    alpha = call.float("alpha", 1.67326319217681884765625)
    gamma = call.float("gamma", 1.05070102214813232421875)
    return gamma * F.elu(x, alpha)


@op("PRelu")
def prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@op("ThresholdedRelu")
def thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return torch.where(x > call.float("alpha", 1.0), x, 0.0)


@op("HardSigmoid")
def hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    alpha, beta = call.float("alpha", 0.2), call.float("beta", 0.5)
    if (round(alpha, 6), beta) == (0.166667, 0.5):
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0, 1)


@op("Swish")
def swish(call: Call, x: Tensor) -> Tensor:
    alpha = call.float("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(x * alpha)


@op("QuickGelu", domain=MICROSOFT)
def quick_gelu(call: Call, x: Tensor) -> Tensor:
    alpha = call.float("alpha", 1.702)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(x * alpha)


@op("Gelu", domain=MICROSOFT)
def gelu(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x)


@op("BiasGelu", domain=MICROSOFT)
def bias_gelu(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


@op("FastGelu", domain=MICROSOFT)
def fast_gelu(call: Call, x: Tensor, bias: Tensor | None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@op("Shrink")
def shrink(call: Call, x: Tensor) -> Tensor:
    bias, edge = call.float("bias", 0.0), call.float("lambd", 0.5)
    shrunk = torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, 0))
    return shrunk.to(x.dtype)


@op("Softmax", "LogSoftmax", "Hardmax")
def softmax(call: Call, x: Tensor) -> Tensor:
    """Along one axis; before version 13 over all axes from `axis` on, taken as one."""
    functions: dict[str, Callable[[Tensor, int], Tensor]] = {
        "Softmax": torch.softmax,
        "LogSoftmax": torch.log_softmax,
        "Hardmax": _hardmax,
    }
    function = functions[call.node.op_type]
    if call.version >= 13:
        return function(x, call.int("axis", -1))
    axis = call.int("axis", 1) % max(x.ndim, 1)
    if axis == x.ndim - 1:
        return function(x, axis)
    return function(torch.flatten(x, axis), axis).reshape(x.shape)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    first = torch.argmax(x, axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, first, 1.0)


@op("Dropout")
def dropout(call: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    """Inference: the input, and a mask that keeps all."""
    if call.given(2) and bool(call.number(2)) and (not call.given(1) or call.number(1)):
        raise call.refusal("training_mode is set; expected a model for inference")
    return x, torch.ones_like(x, dtype=torch.bool)
