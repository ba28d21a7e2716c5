"""Poolings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompiler.capture.onnx.call import Call, Size
from qcompiler.capture.onnx.ops.windows import Windows, pad_axes, windows
from qcompiler.capture.onnx.table import op

MAX = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
AVERAGE = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _at(call: Call, x: Tensor) -> tuple[Windows, bool]:
    """The windows, and whether ones that are only begun count."""
    return windows(call, list(x.shape[2:])), bool(call.int("ceil_mode", 0))


@op("MaxPool")
def max_pool(call: Call, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """The largest element of each window and, if asked for, its place in the whole input."""
    if not x.is_floating_point():
        whole = max_pool_float(call, x.float())
        values = whole[0] if isinstance(whole, tuple) else whole
        return (values.to(x.dtype), whole[1]) if isinstance(whole, tuple) else values.to(x.dtype)
    return max_pool_float(call, x)


def max_pool_float(call: Call, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    (at, ceil), sizes = _at(call, x), list(x.shape[2:])
    padding: list[Size] = at.before
    if not at.torch_limit:
        at = at.rounded_up(sizes) if ceil else at
        x, padding, ceil = at.pad(x, float("-inf")), [0] * len(sizes), False
    function = MAX[len(sizes) - 1]
    if len(call.node.outputs) == 1:
        pooled: Tensor = function(x, at.kernel, at.strides, padding, at.dilations, ceil)
        return pooled
    values, places = function(
        x, at.kernel, at.strides, padding, at.dilations, ceil, return_indices=True
    )
    moved = [b - p for b, p in zip(at.before, padding, strict=True)]
    order = bool(call.int("storage_order", 0))
    return values, _place_in_whole(places, list(x.shape[2:]), moved, sizes, order)


def _place_in_whole(
    places: Tensor, padded: list[Size], before: list[Size], sizes: list[Size], columns_first: bool
) -> Tensor:
    """torch counts in one padded plane, ONNX in the whole tensor; the last axis may be slowest."""
    position = places
    axes: list[Tensor] = []
    for size, pad in zip(padded[::-1], before[::-1], strict=True):
        axes.insert(0, position % size - pad)
        position = position // size
    if columns_first:
        axes, sizes = axes[::-1], sizes[::-1]
    plane: Size = 1
    flat = torch.zeros_like(places)
    for axis, size in zip(axes, sizes, strict=True):
        flat, plane = flat * size + axis, plane * size
    n, c = places.shape[:2]
    planes = torch.arange(n * c).reshape([n, c] + [1] * len(sizes))
    return flat + planes * plane


@op("AveragePool")
def average_pool(call: Call, x: Tensor) -> Tensor:
    """Σ / number of elements, with the padding among them or without."""
    at, ceil = _at(call, x)
    include = bool(call.int("count_include_pad", 0))
    if at.torch_limit and set(at.dilations) == {1}:
        function = AVERAGE[len(at.kernel) - 1]
        y: Tensor = function(x, at.kernel, at.strides, at.before, ceil, include)
        return y
    axes = list(range(-len(at.kernel), 0))
    sizes: list[Size] = list(x.shape[2:])
    ones = torch.ones([1, 1, *sizes], dtype=x.dtype)
    if include:
        ones = at.pad(ones, 1.0)
    wide = at.rounded_up(sizes) if ceil else at
    counted = pad_axes(
        ones,
        [0 if include else b for b in wide.before],
        [w - a if include else w for w, a in zip(wide.after, at.after, strict=True)],
    )
    return wide.cut(wide.pad(x)).sum(axes) / wide.cut(counted).sum(axes)


@op("LpPool")
def lp_pool(call: Call, x: Tensor) -> Tensor:
    """(Σ |x|ᵖ)^(1/p) over each window."""
    at, ceil = _at(call, x)
    at = at.rounded_up(list(x.shape[2:])) if ceil else at
    p = call.int("p", 2)
    powers = at.cut(at.pad(x.abs().pow(p)))
    return powers.sum(list(range(-len(at.kernel), 0))).pow(1 / p)


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.ndim))


@op("GlobalAveragePool")
def global_average_pool(call: Call, x: Tensor) -> Tensor:
    return x.mean(_spatial(x), True)


@op("GlobalMaxPool")
def global_max_pool(call: Call, x: Tensor) -> Tensor:
    return x.amax(_spatial(x), True)


@op("GlobalLpPool")
def global_lp_pool(call: Call, x: Tensor) -> Tensor:
    y: Tensor = torch.linalg.vector_norm(x, call.int("p", 2), _spatial(x), True)
    return y


@op("MaxUnpool")
def max_unpool(call: Call, x: Tensor, places: Tensor) -> Tensor:
    """Each element back at its place in the tensor that was pooled, zeros elsewhere.

    A larger `output_shape` adds zeros at the end; the places count in the pooled tensor.
    """
    rank = x.ndim - 2
    kernel, pads = call.ints("kernel_shape"), call.ints("pads", [0] * 2 * rank)
    strides = call.ints("strides", [1] * rank)
    sizes = [
        (n - 1) * s + k - pads[i] - pads[i + rank]
        for i, (n, s, k) in enumerate(zip(x.shape[2:], strides, kernel, strict=True))
    ]
    shape: list[Size] = [*x.shape[:2], *sizes]
    total: Size = 1
    for size in shape:
        total = total * size
    y = torch.zeros(total, dtype=x.dtype).scatter(0, places.reshape(-1), x.reshape(-1))
    y = y.reshape(shape)
    if not call.given(2):
        return y
    wanted = call.sizes(2)[-rank:]
    return pad_axes(y, [0] * rank, [w - n for w, n in zip(wanted, sizes, strict=True)])
