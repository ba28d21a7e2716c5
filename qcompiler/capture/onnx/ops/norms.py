"""Normalisations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompiler.capture.onnx.call import Call
from qcompiler.capture.onnx.table import MICROSOFT, op

SKIP_EPS = 1e-12
"""Default of the operators of ONNX Runtime that add first."""


@op("LayerNormalization")
def layer_norm(
    call: Call, x: Tensor, gain: Tensor, bias: Tensor | None
) -> Tensor | tuple[Tensor, ...]:
    """Over all axes from `axis` on; also the mean and 1 / deviation where they are asked for."""
    axis = call.int("axis", -1) % x.ndim
    eps, shape = call.float("epsilon", 1e-5), list(x.shape[axis:])
    fits = list(gain.shape) == shape and (bias is None or list(bias.shape) == shape)
    if fits and gain.dtype == x.dtype:
        y = F.layer_norm(x, shape, gain, bias, eps)
    else:
        y = F.layer_norm(x, shape, None, None, eps) * gain
        y = y if bias is None else y + bias
    if len(call.node.outputs) == 1:
        return y
    axes = list(range(axis, x.ndim))
    mean = x.float().mean(axes, True)
    variance = (x.float() - mean).square().mean(axes, True)
    return y, mean, torch.rsqrt(variance + eps)


@op("RMSNormalization")
def rms_norm(call: Call, x: Tensor, gain: Tensor) -> Tensor:
    axis = call.int("axis", -1) % x.ndim
    eps, shape = call.float("epsilon", 1e-5), list(x.shape[axis:])
    if list(gain.shape) == shape and gain.dtype == x.dtype:
        return F.rms_norm(x, shape, gain, eps)
    return F.rms_norm(x, shape, None, eps) * gain


@op("SimplifiedLayerNormalization", domain=MICROSOFT)
def simplified_layer_norm(call: Call, x: Tensor, gain: Tensor) -> Tensor:
    return F.rms_norm(x, list(gain.shape), gain, call.float("epsilon", 1e-5))


@op("SkipLayerNormalization", domain=MICROSOFT)
def skip_layer_norm(
    call: Call, x: Tensor, skip: Tensor, gain: Tensor, beta: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    total = x + skip if bias is None else x + skip + bias
    y = F.layer_norm(total, list(gain.shape), gain, beta, call.float("epsilon", SKIP_EPS))
    return y, None, None, total


@op("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_simplified_layer_norm(
    call: Call, x: Tensor, skip: Tensor, gain: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    total = x + skip if bias is None else x + skip + bias
    y = F.rms_norm(total, list(gain.shape), gain, call.float("epsilon", SKIP_EPS))
    return y, None, None, total


@op("BatchNormalization")
def batch_norm(
    call: Call, x: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    if call.int("training_mode", 0):
        raise call.refusal("training_mode is set; expected a model for inference")
    return F.batch_norm(x, mean, variance, gain, bias, False, 0.0, call.float("epsilon", 1e-5))


@op("InstanceNormalization")
def instance_norm(call: Call, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=gain, bias=bias, eps=call.float("epsilon", 1e-5))


@op("GroupNormalization")
def group_norm(call: Call, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Gain and bias for each channel; before version 21 for each group."""
    groups, eps = call.int("num_groups"), call.float("epsilon", 1e-5)
    if call.version < 21:
        per_group = x.shape[1] // groups
        gain, bias = (t.repeat_interleave(per_group) for t in (gain, bias))
    return F.group_norm(x, groups, gain, bias, eps)


@op("LpNormalization")
def lp_norm(call: Call, x: Tensor) -> Tensor:
    axis, p = call.int("axis", -1), call.int("p", 2)
    length = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(length == 0, torch.zeros_like(x), x / length)


@op("MeanVarianceNormalization")
def mean_variance_norm(call: Call, x: Tensor) -> Tensor:
    axes = call.ints("axes", [0, 2, 3])
    centred = x - x.mean(axes, True)
    return centred / (torch.sqrt(centred.square().mean(axes, True)) + 1e-9)


@op("LRN")
def local_response_norm(call: Call, x: Tensor) -> Tensor:
    size = call.int("size")
    alpha, beta, bias = call.float("alpha", 1e-4), call.float("beta", 0.75), call.float("bias", 1.0)
    before = (size - 1) // 2
    widths = [0, 0] * (x.ndim - 2) + [before, size - 1 - before]
    squares = F.pad(x.square(), widths).unfold(1, size, 1).sum(-1)
    return x / torch.pow(bias + alpha / size * squares, beta)
