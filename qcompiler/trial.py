"""What a scheme would cost a layer: tried on tensors, nothing of the program changes.

    error = ‖ Q(x) Q(W)ᵀ - x Wᵀ ‖² / ‖ x Wᵀ ‖²        on sampled inputs x

Passes that choose (a scale, an outlier, a rank) choose by this number, with the plan's formats.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from qcompiler.formats import QFormat, Scheme
from qcompiler.ops import fake_quantize
from qcompiler.rounding import nearest


def rounded(weight: Tensor, fmt: QFormat | None) -> Tensor:
    """`weight` (out, in, …) as `fmt` stores it, rounded to nearest, float32."""
    weight = weight.float()
    if fmt is None:
        return weight
    if weight.ndim > 2:
        fmt = fmt.by_rows
    rows = weight.reshape(weight.shape[0], -1)
    return nearest(rows, fmt).dequantize().reshape(weight.shape)


def rounded_input(x: Tensor, fmt: QFormat | None) -> Tensor:
    """Input vectors (vectors, channels) as `fmt` computes with them, float32."""
    if fmt is None:
        return x
    block = (-1,) if fmt.block is not None and len(fmt.block) > 1 else fmt.block
    return fake_quantize(x, str(replace(fmt, block=block, dynamic=True)))


def layer_noise(x: Tensor, weight: Tensor, scheme: Scheme, wanted: Tensor | None = None) -> float:
    """Mean square of what rounding adds to a layer's output on the vectors `x` (vectors, channels).

    `weight` is (out, channels) or a kernel (out, channels, …), whose taps are read as layers of
    their own. `wanted` is the output to compare with, if it is not x Wᵀ.
    """
    if wanted is None:
        wanted = x @ matrix(weight).t()
    found = rounded_input(x, scheme.activation) @ matrix(rounded(weight, scheme.weight)).t()
    return float((found - wanted).pow(2).mean())


def layer_error(x: Tensor, weight: Tensor, scheme: Scheme, wanted: Tensor | None = None) -> float:
    """The same, relative to the mean square of the output itself."""
    if wanted is None:
        wanted = x @ matrix(weight).t()
    size = float(wanted.pow(2).mean())
    return layer_noise(x, weight, scheme, wanted) / size if size else 0.0


def matrix(weight: Tensor) -> Tensor:
    """(out, in, …) as (out · taps, in), float32."""
    return weight.float().movedim(1, -1).reshape(-1, weight.shape[1])
