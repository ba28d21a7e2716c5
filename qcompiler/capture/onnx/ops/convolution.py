"""Convolutions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompiler.capture.onnx.call import Call, Size
from qcompiler.capture.onnx.ops.regions import between
from qcompiler.capture.onnx.ops.windows import Windows, halves, pad_axes, windows
from qcompiler.capture.onnx.table import op

CONV = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@op("Conv")
def conv(call: Call, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return convolve(call, x, w, bias)


def convolve(call: Call, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution that the node's attributes describe, of any tensors."""
    at = windows(call, list(x.shape[2:]), list(w.shape[2:]))
    padding: list[Size] = at.before
    if not at.symmetric:
        x, padding = at.pad(x), [0] * len(at.kernel)
    function = CONV[len(at.kernel) - 1]
    return function(x, w, bias, at.strides, padding, at.dilations, call.int("group", 1))


@op("ConvTranspose")
def conv_transpose(call: Call, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """What Conv's gradient does; padding takes away from the result.

    torch has padding on both sides alike, and more after the end; the rest is cut from a result
    without padding.
    """
    rank = x.ndim - 2
    at = _transposed_windows(call, list(x.shape[2:]), list(w.shape[2:]))
    more = call.ints("output_padding", [0] * rank)
    groups, function = call.int("group", 1), TRANSPOSED[rank - 1]
    extra = [m + b - a for m, b, a in zip(more, at.before, at.after, strict=True)]
    room = zip(extra, at.before, at.strides, at.dilations, strict=True)
    if all(
        isinstance(e, int) and isinstance(b, int) and 0 <= e < max(s, d) and b >= 0
        for e, b, s, d in room
    ):
        return function(x, w, bias, at.strides, at.before, extra, groups, at.dilations)
    y = function(x, w, None, at.strides, 0, 0, groups, at.dilations)
    after = [m - a for m, a in zip(more, at.after, strict=True)]
    y = pad_axes(y, [-b for b in at.before], after)
    return y if bias is None else y + bias.reshape([-1] + [1] * rank)


def _transposed_windows(call: Call, sizes: list[Size], kernel: list[int]) -> Windows:
    """As of a convolution, but the padding may follow from the wanted size of the result."""
    at = windows(call, sizes, kernel)
    how = call.text("auto_pad", "NOTSET")
    if call.has("output_shape"):
        wanted: list[Size] = list(call.ints("output_shape"))[-len(sizes) :]
    elif how in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * s for n, s in zip(sizes, at.strides, strict=True)]
    else:
        return at
    more = call.ints("output_padding", [0] * len(sizes))
    whole = [
        s * (n - 1) + m + span
        for s, n, m, span in zip(at.strides, sizes, more, at.spans, strict=True)
    ]
    totals = [full - want for full, want in zip(whole, wanted, strict=True)]
    before, after = halves(call, totals, "SAME_UPPER" if how == "SAME_UPPER" else "SAME_LOWER")
    return Windows(at.kernel, at.strides, at.dilations, before, after)


@op("DeformConv")
def deform_conv(
    call: Call, x: Tensor, w: Tensor, offset: Tensor, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """y[o] = Σ w[o, c, k] · mask[k] · x[c] at (window + k + offset[k]), between the pixels."""
    if x.ndim != 4:
        raise call.refusal(f"its input has shape {list(x.shape)}; expected two spatial axes")
    n, c = x.shape[:2]
    at = windows(call, list(x.shape[2:]), list(w.shape[2:]))
    parts, taps = call.int("offset_group", 1), math.prod(at.kernel)
    rows, columns = offset.shape[2:]
    moved = offset.reshape(n, parts, taps, 2, rows, columns)
    places = []
    for axis in range(2):
        steps = torch.arange(moved.shape[4 + axis]) * at.strides[axis] - at.before[axis]
        tap = torch.arange(at.kernel[axis]) * at.dilations[axis]
        shape, spread = [1, 1, 1, 1, 1], [1, 1]
        shape[3 + axis], spread[axis] = -1, at.kernel[axis]
        tap = tap.reshape(spread).expand(at.kernel).reshape(1, 1, taps, 1, 1)
        places.append(moved[:, :, :, axis] + steps.reshape(shape) + tap)
    planes = x.reshape(n * parts, c // parts, *x.shape[2:])
    row, column = (p.flatten(0, 1) for p in places)
    found = between(planes, torch.arange(n * parts).reshape(-1, 1, 1, 1), row, column)
    found = found.movedim(-1, 1).reshape(n, parts, c // parts, taps, rows, columns)
    if mask is not None:
        found = found * mask.reshape(n, parts, 1, taps, rows, columns)
    groups = call.int("group", 1)
    columns_of = found.reshape(n, groups, -1, rows * columns)
    y = torch.matmul(w.reshape(groups, w.shape[0] // groups, -1), columns_of)
    y = y.reshape(n, w.shape[0], rows, columns)
    return y if bias is None else y + bias.reshape(-1, 1, 1)
