"""What operators do to axes, once, as a table: everything else is derived from it.

An operator is written as a sum of products of its operands, in the notation of einsum with letters
for axes, `*` for leading axes that all share, and `!` before an axis whose indices the operator
tells apart (rows of a table)::

    linear:   "0:* k, 1:n k -> * n"   and   "2:n -> * n"       y = x Wᵀ  +  b

Elementwise operators are named by what passes through them: any linear map (`PASS`), a positive
scale only (`HOMOGENEOUS`), nothing (`BREAK`). Operators with hidden intermediate values (attention,
norms) say so as a sequence of products over virtual values, in `spaces/rules.py`.
"""

from __future__ import annotations

import torch

aten = torch.ops.aten

PRODUCTS: dict[object, tuple[str, ...]] = {
    aten.linear.default: ("0:* k, 1:n k -> * n", "2:n -> * n"),
    aten.mm.default: ("0:m k, 1:k n -> m n",),
    aten.bmm.default: ("0:b m k, 1:b k n -> b m n",),
    aten.addmm.default: ("1:m k, 2:k n -> m n", "0:* n -> * n"),
    aten.baddbmm.default: ("1:b m k, 2:b k n -> b m n", "0:* n -> * n"),
    aten.embedding.default: ("0:!r d -> !* d",),
}
"""Operator → summands; `n:` is the number of the argument."""

CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
"""Convolution → number of spatial axes."""

ELEMENTWISE_PRODUCT = {aten.mul.Tensor, aten.mul.Scalar}
ELEMENTWISE_QUOTIENT = {aten.div.Tensor, aten.div.Scalar}
ELEMENTWISE_SUM = {aten.add.Tensor, aten.sub.Tensor}
"""Binary operators with broadcasting; with a Python number, see `rules.py`."""

HOMOGENEOUS: set[object] = {
    aten.relu.default,
    aten.relu_.default,
    aten.leaky_relu.default,
    aten.abs.default,
}

BREAK: set[object] = {
    aten.silu.default,
    aten.gelu.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.exp.default,
    aten.log.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.sin.default,
    aten.cos.default,
    aten.erf.default,
    aten.softplus.default,
    aten.elu.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.mish.default,
    aten.pow.Tensor_Scalar,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.reciprocal.default,
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.log1p.default,
    aten.relu6.default,
    aten.square.default,
    aten.round.default,
    aten.floor.default,
    aten.ceil.default,
    aten.sign.default,
    aten.log2.default,
    aten.exp2.default,
    aten.expm1.default,
    aten.selu.default,
    aten.celu.default,
    aten.log_sigmoid.default,
    aten.threshold.default,
    aten.clamp_max.default,
    aten.hardshrink.default,
    aten.softshrink.default,
    aten.tan.default,
    aten.atan.default,
    aten.sinh.default,
    aten.cosh.default,
    aten.erfc.default,
}
SOFTMAX = {aten.softmax.int, aten._softmax.default}
REDUCTIONS = {aten.mean.dim, aten.sum.dim_IntList}
MAX_POOLS = {aten.max_pool2d.default, aten.max_pool1d.default}
POOLS = MAX_POOLS | {
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.avg_pool1d.default,
    aten.adaptive_avg_pool1d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.vec,
}
"""They mix places, each channel by itself."""
NORMS = {aten.rms_norm.default, aten.layer_norm.default}
