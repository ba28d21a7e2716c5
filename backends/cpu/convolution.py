"""`qc_cpu::conv`: a convolution by kernels that are generated for its format and this CPU.

    y = behind(x̂ ∗ Ŵ + b + residual)        Ŵ: packed codes, x̂: rounded, with its zero around it

Rows of the packed weight are taps by channels, as an image lies that has its channels last; of a
depthwise one see `codegen/depthwise.py`. What is summed are integers, exact; see `codegen/conv.py`.
`behind` is one of `codegen/functions.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qcompiler.backends.cpu import generated
from qcompiler.backends.cpu.calls import scratch
from qcompiler.backends.cpu.codegen import depthwise, layout
from qcompiler.backends.cpu.conv_calls import ConvCall, MeanCall
from qcompiler.backends.cpu.images import Image, RoundCall
from qcompiler.backends.cpu.window import Window, pitch
from qcompiler.errors import BadInput
from qcompiler.formats import QTensor

_library = torch.library.Library("qc_cpu", "FRAGMENT")
_library.define(
    "conv(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor? start, Tensor bias,"
    " Tensor? x_scale, Tensor? x_zero, str format, str activation, int out, int[] kernel,"
    " int[] stride, int[] padding, int[] dilation, *, Tensor? residual=None,"
    " str behind='', bool last=False) -> Tensor"
)


def width(channels: int, taps: int) -> int:
    """Inputs of a packed row."""
    return taps * pitch(channels, taps)


def pack(q: QTensor, channels: int, x_zero: int | None) -> generated.Packed:
    """A weight (out, channels · taps) as the kernel takes it."""
    out, inputs = q.data.shape
    taps = inputs // channels
    rows = q.data.reshape(out, channels, taps).transpose(1, 2)
    full = width(channels, taps)
    rows = torch.nn.functional.pad(rows, (0, full // taps - channels)).reshape(out, full)
    return generated.pack(QTensor(rows, q.grid), False, x_zero)


def pack_depthwise(q: QTensor, x_zero: int | None) -> generated.Packed:
    """The same for a weight (channels, taps) of which each row reads a channel of its own."""
    channels, taps = q.data.shape
    codes = q.data.int()
    if q.zero is not None:
        codes = codes - generated.by_group(q.zero, q, taps).int()
    scale = layout.pack_side(generated.by_group(q.scale, q, taps).float(), channels)
    start = None
    if x_zero is not None:
        start = layout.pack_side(-x_zero * codes.sum(1, keepdim=True, dtype=torch.int32), channels)
    return generated.Packed(depthwise.pack(codes), scale, None, start)


def filled(residual: Tensor, outputs: int) -> Tensor:
    """What is added to a result, an image with its channels last, for whole blocks of outputs."""
    missing = outputs - residual.shape[-1]
    return torch.nn.functional.pad(residual, (0, missing)) if missing else residual


def conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    start: Tensor | None,
    bias: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    format: str,
    activation: str,
    out: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    residual: Tensor | None = None,
    behind: str = "",
    last: bool = False,
) -> Tensor:
    """y = behind(x̂ ∗ Ŵ + b + residual).

    x (batch, channels, width) or (batch, channels, height, width), floating point; the rest as
    `generated.linear` has it, a dynamic scale being each image's or the batch's. With `last` the
    result has its channels last in memory.
    """
    window = Window.of(kernel, stride, padding, dilation)
    _check(x, weight, out, window)
    flat = x.ndim == 3
    source = channels_last(x.unsqueeze(2) if flat else x)
    batch, height, wide, channels = source.shape
    y = torch.empty(batch, *window.output(height, wide), weight.shape[0] * layout.OUTPUTS)
    if y.numel():
        parameters = (weight, scale, zero, start, bias, x_scale, x_zero)
        apart = depthwise.is_packed(weight)
        image = Image(
            batch, height, wide, channels, window.padding, pitch(channels, window.taps, apart),
            activation, x_scale, x_zero, partial(scratch, use="image"), summed=not apart,
        )  # fmt: skip
        if residual is not None:
            residual = filled(
                channels_last(residual.unsqueeze(2) if flat else residual), y.shape[-1]
            )
        RoundCall(source, image, scratch)()
        ConvCall(image, y, parameters, format, window, scratch, residual=residual, behind=behind)()
    y = y[..., :out].permute(0, 3, 1, 2)
    y = y.squeeze(2) if flat else y
    return y.to(x.dtype).contiguous(memory_format=_order(x, last))


def _check(x: Tensor, weight: Tensor, out: int, window: Window) -> None:
    """Kernels trust sizes: an image that is not the weight's would be read past its end."""
    if x.ndim != 4 and (x.ndim, window.kernel[0]) != (3, 1):
        raise BadInput(f"qc_cpu::conv takes a batch of images; found {tuple(x.shape)}")
    height, wide = (1, x.shape[2]) if x.ndim == 3 else x.shape[2:]
    if min(window.output(height, wide)) < 0:
        raise BadInput(f"qc_cpu::conv: {tuple(x.shape)} is smaller than its kernel")
    if depthwise.is_packed(weight):
        found, held = (x.shape[1], -(-window.taps // 2)), (out, weight.shape[1])
        if found != held:
            raise BadInput(
                "qc_cpu::conv has a depthwise weight of {} channels and {} pairs of taps; "
                "found {} and {}".format(*held, *found)
            )
        return
    chunks = -(-width(x.shape[1], window.taps) // layout.CHUNK)
    if chunks != weight.shape[1]:
        raise BadInput(
            f"qc_cpu::conv: {x.shape[1]} channels make {chunks} chunks of inputs; its weight has "
            f"{weight.shape[1]}"
        )


def channels_last(x: Tensor) -> Tensor:
    """An image (batch, channels, height, width) as (batch, height, width, channels), float32 and
    contiguous."""
    return x.float().permute(0, 2, 3, 1).contiguous()


def _order(x: Tensor, last: bool) -> torch.memory_format:
    return torch.channels_last if last and x.ndim == 4 else torch.contiguous_format


def _shape(x: Tensor, *parameters: Any, last: bool = False, **others: object) -> Tensor:
    *_, out, kernel, stride, padding, dilation = parameters
    window = Window.of(kernel, stride, padding, dilation)
    height, width = (1, x.shape[2]) if x.ndim == 3 else x.shape[2:]
    size = window.output(height, width)[-len(x.shape[2:]) :]
    return x.new_empty((x.shape[0], out, *size)).contiguous(memory_format=_order(x, last))


def mean(x: Tensor, keep: bool) -> Tensor:
    """The mean over height and width of x (batch, channels, height, width); with `keep` these axes
    stay, 1 long."""
    source = channels_last(x)
    y = torch.empty(x.shape[:2])
    MeanCall(source, y)()
    y = y.to(x.dtype)
    return y[..., None, None] if keep else y


def _mean_shape(x: Tensor, keep: bool) -> Tensor:
    return x.new_empty((*x.shape[:2], 1, 1) if keep else x.shape[:2])


_library.define("mean(Tensor x, bool keep) -> Tensor")
_library.impl("mean", mean, "CPU")
torch.library.register_fake("qc_cpu::mean", _mean_shape, lib=_library)
_library.impl("conv", conv, "CPU")
torch.library.register_fake("qc_cpu::conv", _shape, lib=_library)
