"""Bias correction: take the mean error of each output off.

    b' = b + (W - W') E[x]

(Nagel et al. 2019, data-free quantization through weight equalization and bias correction, eq. 17.)
"""

from __future__ import annotations

from torch import Tensor


def bias_correction(weight: Tensor, rounded: Tensor, mean: Tensor) -> Tensor:
    """What to add to the bias, float32 (out,).

    `weight` and `rounded` are (out, in); `mean` of the inputs is (in,), or (out, in) where rows
    read inputs of their own.
    """
    return ((weight.float() - rounded.float()) * mean.float()).sum(-1)
