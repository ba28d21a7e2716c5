"""Sampling on grids, windows put together to images, cutting and padding around the middle."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompiler.capture.onnx.call import Call, Size
from qcompiler.capture.onnx.ops.windows import pad_axes
from qcompiler.capture.onnx.table import op

MODES = {"linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest",
         "cubic": "bicubic", "bicubic": "bicubic"}  # fmt: skip


@op("GridSample")
def grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    mode, padding = call.text("mode", "linear"), call.text("padding_mode", "zeros")
    if mode not in MODES or (MODES[mode] == "bicubic" and x.ndim != 4):
        raise call.refusal(f"mode is {mode!r} on {x.ndim - 2} spatial axes")
    corners = bool(call.int("align_corners", 0))
    return F.grid_sample(x, grid, MODES[mode], padding, corners)


@op("AffineGrid")
def affine_grid(call: Call, theta: Tensor) -> Tensor:
    size = call.sizes(1)
    return F.affine_grid(theta, size, align_corners=bool(call.int("align_corners", 0)))


@op("CenterCropPad")
def center_crop_pad(call: Call, x: Tensor) -> Tensor:
    """Cut or zeros on both sides alike; the odd one is after."""
    wanted, axes = call.sizes(1), [a % x.ndim for a in call.ints("axes", list(range(x.ndim)))]
    before: list[Size] = [0] * x.ndim
    after: list[Size] = [0] * x.ndim
    for axis, want in zip(axes, wanted, strict=True):
        more = want - x.shape[axis]
        before[axis] = more // 2 if more >= 0 else -(-more // 2)
        after[axis] = more - before[axis]
    return pad_axes(x, before, after)


@op("Col2Im")
def col2im(call: Call, x: Tensor) -> Tensor:
    """Each window's elements added at their places in the image, padding cut off."""
    image, block = call.sizes(1), call.whole(2)
    rank = len(block)
    dilations, strides = call.ints("dilations", [1] * rank), call.ints("strides", [1] * rank)
    pads = call.ints("pads", [0] * 2 * rank)
    padded = [n + pads[i] + pads[i + rank] for i, n in enumerate(image)]
    flat = torch.zeros([1] * 2 * rank, dtype=torch.int64)  # taps…, windows…
    for i, (size, k, d, s) in enumerate(zip(padded, block, dilations, strides, strict=True)):
        count = (size - (k - 1) * d - 1) // s + 1
        shape = [1] * 2 * rank
        shape[i], shape[i + rank] = k, -1
        places = torch.arange(k).unsqueeze(-1) * d + torch.arange(count) * s
        flat = flat * size + places.reshape(shape)
    total: Size = 1
    taps = 1
    for size, k in zip(padded, block, strict=True):
        total, taps = total * size, taps * k
    n, c = x.shape[0], x.shape[1] // taps
    y = torch.zeros([n, c, total], dtype=x.dtype)
    y = y.index_add(2, flat.flatten(), x.reshape(n, c, -1)).reshape([n, c, *padded])
    return pad_axes(y, [-p for p in pads[:rank]], [-p for p in pads[rank:]])
