"""The operators that qcompiler adds to aten: `qc::…`, in plain torch.

They are the reference: every backend kernel is compared with them. Everything else in a program is
an ordinary aten operator.

========================  =====================================================================
`qc::fake_quantize`       x' = dequantize(quantize(x)) with given scales, or dynamic ones
`qc::dequantize`          a stored (packed) weight as floating point numbers
`qc::rope`                rotary position embedding, halves or interleaved pairs
`qc::hadamard`            x Hᵀ / √n along the last axis, as a fast transform
========================  =====================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompiler.formats import (
    QFormat,
    block_range,
    dequantize,
    quantize,
    range_to_scale,
    unpack,
)
from qcompiler.hadamard import core_size, hadamard_core

_library = torch.library.Library("qc", "DEF")
_library.define(
    "fake_quantize(Tensor x, str format, Tensor? scale=None, Tensor? zero=None) -> Tensor"
)
_library.define(
    "dequantize(Tensor data, Tensor scale, Tensor? zero, str format, int width, ScalarType dtype)"
    " -> Tensor"
)
_library.define("hadamard(Tensor x) -> Tensor")
_library.define("rope(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor")


def fake_quantize(
    x: Tensor, format: str, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """Round `x` to what `format` can hold; same shape and dtype as `x`.

    Without `scale` the format is dynamic: each block (a token, say) brings its own.
    """
    fmt = QFormat.parse(format)
    if scale is None:
        scale, zero = range_to_scale(*block_range(x, fmt), fmt)
    wide = x if x.dtype == torch.float64 else x.float()
    q = quantize(wide, scale, zero, fmt)
    return dequantize(q, scale, zero, x.dtype)


def dequantize_packed(
    data: Tensor, scale: Tensor, zero: Tensor | None, format: str, width: int, dtype: torch.dtype
) -> Tensor:
    """Packed integers (…, bytes) to floating point numbers (…, `width`) of `dtype`."""
    fmt = QFormat.parse(format)
    return dequantize(unpack(data, fmt.bits, width, fmt.signed), scale, zero, dtype)


def hadamard_transform(x: Tensor, transposed: bool = False) -> Tensor:
    """x Hᵀ / √n along the last axis (…, n), with H = H₂ ⊗ … ⊗ H₂ ⊗ H_m of `hadamard.hadamard`.

    Each H₂ is one addition and one subtraction of halves, so that n = 2^k m costs n (k + m)
    operations and not n². A size without a Hadamard matrix (92, say) is an error.
    """
    n = int(x.shape[-1])
    m = core_size(n)
    if m is None:
        raise ValueError(f"no Hadamard matrix of size {n} can be constructed")
    y = x.reshape(*x.shape[:-1], n // m, m)
    if m > 1:
        core = hadamard_core(m).to(y)
        y = y @ (core if transposed else core.t())
    width = n // m
    while width > 1:
        y = y.reshape(*x.shape[:-1], -1, 2, width // 2 * m)
        first, second = y.unbind(-2)
        y = torch.stack((first + second, first - second), -2)
        width //= 2
    out: Tensor = y.reshape(x.shape) * n**-0.5
    return out


def hadamard(x: Tensor) -> Tensor:
    """See `hadamard_transform`."""
    return hadamard_transform(x)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pairs of channels: x cos + rot(x) sin (RoFormer, Su et al. 2021, eq. 34).

    A pair is (i, i + d/2) by default, (2i, 2i + 1) when `interleaved`. `cos` and `sin` broadcast
    against `x`, whose last axis holds the d rotated channels.
    """
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    return x * cos + turned * sin


def _fake_quantize_shape(
    x: Tensor, format: str, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    return torch.empty_like(x)


def _dequantize_shape(
    data: Tensor, scale: Tensor, zero: Tensor | None, format: str, width: int, dtype: torch.dtype
) -> Tensor:
    return data.new_empty((*data.shape[:-1], width), dtype=dtype)


def _hadamard_shape(x: Tensor) -> Tensor:
    if core_size(int(x.shape[-1])) is None:
        raise ValueError(f"no Hadamard matrix of size {x.shape[-1]} can be constructed")
    return torch.empty_like(x)


def _rope_shape(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    return x * cos + x * sin


for _name, _run, _shape in (
    ("fake_quantize", fake_quantize, _fake_quantize_shape),
    ("dequantize", dequantize_packed, _dequantize_shape),
    ("hadamard", hadamard, _hadamard_shape),
    ("rope", rope, _rope_shape),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qc::{_name}", _shape, lib=_library)


def _no_context(ctx: Any, inputs: tuple[object, ...], output: object) -> None:
    """Nothing of the forward is needed backward."""


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Rounding counts as the identity (Bengio et al. 2013)."""
    return grad, None, None, None


def _hadamard_backward(ctx: Any, grad: Tensor) -> Tensor:
    return hadamard_transform(grad, transposed=True)


for _name, _backward in (("fake_quantize", _straight_through), ("hadamard", _hadamard_backward)):
    torch.library.register_autograd(
        f"qc::{_name}", _backward, setup_context=_no_context, lib=_library
    )
