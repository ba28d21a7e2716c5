"""Quantized arithmetic as functions of torch tensors, which are called while a program is traced.

What ONNX alone can say becomes a symbolic operator (it has a shape and no arithmetic), the rest is
plain torch.

Activations are quantized to *uint8*: a signed q becomes q + 128 with zero point 128. The numbers
are the same, but on x86 a product of uint8 and int8 is ten times faster than one of int8 and int8.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

from qcompiler import ops
from qcompiler.formats import QFormat


def onnx_op(
    op: str,
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    shape: Sequence[int | torch.SymInt],
    **attributes: int,
) -> Tensor:
    """One ONNX operator with one output of `dtype` and `shape`."""
    version = 1 if op.startswith("com.microsoft::") else None
    return torch.onnx.ops.symbolic(
        op, inputs, {**attributes}, dtype=dtype, shape=tuple(shape), version=version
    )


def dequantize_linear(
    q: Tensor, scale: Tensor, zero: Tensor | None, axis: int = 0, block: int | None = None
) -> Tensor:
    """(q - zero) * scale in float32; one scale for all, or one for each (`block` on) `axis`."""
    extra = {} if block is None else {"block_size": block}
    inputs = (q, scale) if zero is None else (q, scale, zero)
    return onnx_op("DequantizeLinear", inputs, torch.float32, q.shape, axis=axis, **extra)


def quantize_linear(
    x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, axis: int = 0
) -> Tensor:
    """clamp(round(x / scale) + zero, low, high) in the type of `zero`."""
    q = onnx_op("QuantizeLinear", (x.float(), scale, zero), zero.dtype, x.shape, axis=axis)
    info = torch.iinfo(zero.dtype)
    return q if (low, high) == (info.min, info.max) else q.clamp(low, high)


def quantize_static(
    x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, axis: int
) -> Tensor:
    """Fake quantization with a known scale, in the form (QDQ) that runtimes fuse."""
    q = quantize_linear(x, scale, zero, low, high, axis)
    return dequantize_linear(q, scale, zero, axis).to(x.dtype)


def quantize(
    x: Tensor, format: str, scale: Tensor, zero: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`qc::quantize`: QuantizeLinear where one scale serves all."""
    fmt = QFormat.parse(format)
    if fmt.block is not None or x.dtype == torch.float64:
        return ops.quantize_integers(x, format, scale, zero, dtype)
    element = torch.int8 if fmt.signed else torch.uint8
    z = torch.zeros((), dtype=element) if zero is None else zero.reshape(()).to(element)
    return quantize_linear(x, scale.float().reshape(()), z, fmt.qmin, fmt.qmax).to(dtype)


def dequantize_integers(
    q: Tensor, format: str, scale: Tensor, zero: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`qc::dequantize_integers`: DequantizeLinear where one scale serves all."""
    narrow = q.dtype in (torch.int8, torch.uint8) and dtype != torch.float64
    if QFormat.parse(format).block is not None or not narrow:
        return ops.dequantize_integers(q, format, scale, zero, dtype)
    z = None if zero is None else zero.reshape(()).to(q.dtype)
    return dequantize_linear(q, scale.float().reshape(()), z).to(dtype)


def dynamic_scale(x: Tensor, axes: tuple[int, ...], qmax: int) -> Tensor:
    """max|x| / qmax over `axes`, which stay with size 1; a block of zeros gets 1."""
    scale = x.abs().amax(axes, keepdim=True) / qmax
    return torch.where(scale > 0, scale, 1.0)


def quantize_dynamic(x: Tensor, axes: tuple[int, ...], qmax: int) -> Tensor:
    """Fake quantization with scales from `x` itself, so that nothing is out of range."""
    wide = x.float()
    scale = dynamic_scale(wide, axes, qmax)
    return (torch.round(wide / scale) * scale).to(x.dtype)


def quantize_dynamic_uint8(x: Tensor) -> Tensor:
    """Fake quantization to 0 … 255 with a scale and zero point that cover all of `x`, and zero."""
    inputs, dtypes = (x.float(),), (torch.uint8, torch.float32, torch.uint8)
    q, scale, zero = torch.onnx.ops.symbolic_multi_out(
        "DynamicQuantizeLinear", inputs, dtypes=dtypes, shapes=(tuple(x.shape), (), ())
    )
    return dequantize_linear(q, scale, zero).to(x.dtype)


def stored(
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    axis: int,
    block: int | None,
    shape: tuple[int, ...] | None,
    dtype: torch.dtype,
) -> Tensor:
    """A stored weight as numbers of `dtype`, in `shape` where that is not the shape of `data`."""
    w = dequantize_linear(data, scale, zero, axis, block)
    return (w if shape is None else w.reshape(shape)).to(dtype)


def linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    axis: int,
    block: int | None,
    bias: Tensor | None,
) -> Tensor:
    """x @ W + bias for a stored weight W (K, N)."""
    y = x @ stored(data, scale, zero, axis, block, None, x.dtype)
    return y if bias is None else y + bias


def gather_rows(
    ids: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group: Tensor | None,
    width: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a table of unsigned `bits` each, low bits first; only these are dequantized."""
    q = embedding(ids, data).float()
    if bits < 8:  # in float: the exporter writes shifts of uint8 with mixed types
        shifted = [torch.floor(q / 2**shift) for shift in range(0, 9, bits)]
        fields = [this - after * 2**bits for this, after in pairwise(shifted)]
        q = torch.stack(fields, -1).flatten(-2)[..., :width]
    z = torch.tensor(2 ** (bits - 1)) if zero is None else embedding(ids, zero)
    return dequantize(q, embedding(ids, scale), z, group).to(dtype)


def dequantize(q: Tensor, scale: Tensor, zero: Tensor | None, group: Tensor | None) -> Tensor:
    """(q - zero) * scale in plain operators.

    `group` (width,) is the number of each column's scale, None for one scale in a row. For a stored
    weight all of these are constants, and a runtime evaluates them when it opens the file.
    """
    q = q.float()
    if zero is not None:
        q = q - _spread(zero.float(), group)  # as numbers: ONNX gathers no integers of 4 bits
    return q * _spread(scale, group)


def spelled_out(
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """A stored weight as numbers of `dtype` in `shape`, in plain operators."""
    return dequantize(data, scale, zero, group).reshape(shape).to(dtype)


def _spread(values: Tensor, group: Tensor | None) -> Tensor:
    return values if group is None or values.ndim == 0 else values.index_select(-1, group)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention, zero where a mask hides all keys: the exporter's would be their mean, or NaN."""
    fits = attn_mask is None or attn_mask.ndim in (2, 3)
    if query.ndim == 3 and fits and not enable_gqa:  # exporters take four axes
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unsqueeze(1)
        return attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        ).squeeze(1)
    y = scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if attn_mask is None:
        return y
    seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
    return torch.where(seen.any(-1, keepdim=True), y, 0.0)


def sort(
    x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """All of the largest, or smallest: of equal numbers TopK gives the first one first."""
    values, places = torch.topk(x, x.shape[dim], dim, descending)
    return values, places


def adaptive_mean(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """`adaptive_avg_pool` of the last axes of any lengths: one product for each."""
    for axis, count in zip(range(-len(output_size), 0), output_size, strict=True):
        shares = _shares(x.shape[axis], count).to(x.dtype)
        x = (x.transpose(axis, -1) @ shares).transpose(axis, -1)
    return x


def _shares(length: int, count: int) -> Tensor:
    """(length, count): what each of `length` places gives to piece i of `count`, which has those
    from floor(i n / k) up to ceil((i + 1) n / k)."""
    place, piece = torch.arange(length)[:, None], torch.arange(count)
    first = torch.div(piece * length, count, rounding_mode="floor")
    end = torch.div((piece + 1) * length + count - 1, count, rounding_mode="floor")
    inside = (place >= first) & (place < end)
    return inside.float() / (end - first).float()


def scattered_linear(x: Tensor, values: Tensor, places: Tensor, rows: int) -> Tensor:
    """x Sᵀ, with `values` at flat `places` of S (rows, in)."""
    flat = x.new_zeros(rows * x.shape[-1]).scatter(0, places.long(), values)
    return torch.nn.functional.linear(x, flat.reshape(rows, x.shape[-1]))
