"""Which convolutions the generated kernel serves: formats and shapes. Whether it pays, is measured
(`race_conv.py`)."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod

import torch
from torch import Tensor, fx

from qcompiler.backend import Capability
from qcompiler.backends.cpu import convolution, generated
from qcompiler.backends.cpu.calls import group_of
from qcompiler.backends.cpu.kernels import INTEGERS, Call, Static, instructions, point_of
from qcompiler.backends.cpu.window import Window
from qcompiler.formats import Grid, QFormat, QTensor, Scheme
from qcompiler.sites import Site
from qcompiler.vectors import window_of

NAME = "conv"
ACTIVATIONS = (
    "int[2-8]:sample:dynamic",
    "int[2-8]:sample:dynamic:full",
    "int[2-8]:sample:dynamic:clip*",
    "int[2-8]:block[*]x[*]:dynamic",  # a line of a conv1d
    "int[2-8]:tensor:dynamic",
    "int[2-8]:tensor",
    "int[2-8]:tensor:full",
    "int[2-8]:tensor:asym",
    "uint[2-8]:tensor",
    "uint[2-8]:tensor:asym",
)
CLAIMS = tuple(
    Capability(
        NAME, "conv", weight, activation, 1e-5, "generated for this CPU", True, "int32"
    )
    for weight in INTEGERS
    for activation in ACTIVATIONS
)  # fmt: skip
PROOFS = (("int8:channel:full", "int8:tensor:dynamic:full"), ("int4:channel", "uint8:tensor:asym"))
"""(weight, activation) formats that it must be exact with before it is used …"""
CHANNELS = 64
"""… on as many channels, all of them read or each by itself."""


def refuses(site: Site, scheme: Scheme) -> str | None:
    """Why the kernel does not serve a convolution of formats that it is made for; None if it does,
    or is not made for them."""
    if scheme.weight is None or not any(c.fits(site, scheme) for c in CLAIMS):
        return None
    if value_of(site).ndim != site.weight.meta["val"].ndim:
        return "takes a batch of images; found one without a batch"
    block = scheme.activation.block if scheme.activation is not None else None
    if block is not None and len(block) != value_of(site).ndim - 1:
        return f"takes one scale for each image, or for all; found {scheme.activation}"
    out, channels, *kernel = (int(n) for n in site.weight.meta["val"].shape)
    groups = window_of(site).groups
    if groups not in (1, out) or groups == out > 1 != channels:
        return f"takes one group of channels, or one for each; found {groups} with {out} outputs"
    if group := group_of(scheme.weight):
        return f"takes one scale for each output; found groups of {group} inputs"
    inputs = convolution.width(channels, prod(kernel))
    return generated.fits(out, inputs, scheme.weight) or self_test()


def prepare(
    q: QTensor,
    channels: int,
    bias: Tensor | None,
    activation: QFormat,
    static: Static,
    window: Window,
) -> Call:
    """The operator with all that it needs, for a weight (out, channels / groups · taps) and an
    image of so many channels."""
    point = point_of(activation, static)
    out, inputs = q.data.shape
    depthwise = inputs < channels * window.taps
    packed = (
        convolution.pack_depthwise(q, point) if depthwise else convolution.pack(q, channels, point)
    )
    parameters = {
        **packed._asdict(),
        "bias": generated.pack_bias(bias, out),
        "x_scale": None if static.scale is None else static.scale.float(),
        "x_zero": None if point is None else torch.tensor([float(point)]),
    }
    constants = (str(q.format.decoded), str(activation), out, *map(list, window))
    return Call(torch.ops.qc_cpu.conv.default, parameters, constants)


def value_of(site: Site) -> Tensor:
    """What it reads."""
    assert isinstance(site.x, fx.Node)
    value: Tensor = site.x.meta["val"]
    return value


def self_test() -> str | None:
    """Prove the kernel on this CPU with codes at both ends of their range; None, or what is wrong:
    there sums of 16 bits overflow."""
    return _proved(instructions())


@lru_cache(maxsize=8)
def _proved(instructions: str) -> str | None:
    for weight, activation in PROOFS:
        for groups in (1, CHANNELS):
            if reason := _proof(QFormat.parse(weight), QFormat.parse(activation), groups):
                return reason
    return None


def _proof(fmt: QFormat, activation: QFormat, groups: int = 1) -> str | None:
    shape = (CHANNELS, CHANNELS // groups * 9)
    sign = torch.arange(shape[0] * shape[1]).reshape(shape) * 7 % 11 < 5
    extremes = torch.where(sign, fmt.qmin, fmt.qmax).to(torch.int16)
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    for data in (
        torch.full_like(extremes, fmt.qmin),
        torch.full_like(extremes, fmt.qmax),
        extremes,
    ):
        q = QTensor(data, Grid(fmt, torch.full(fmt.scale_shape(shape), 0.5)))
        x = torch.ones(1, CHANNELS, 5, 5)
        grid = Grid.fit(x, replace(activation, dynamic=True))
        static = Static() if activation.dynamic else Static(grid.scale, grid.zero)
        y = prepare(q, CHANNELS, None, activation, static, window)(x)
        weight = q.dequantize(torch.float64).reshape(CHANNELS, -1, 3, 3)
        want = torch.conv2d(grid.round(x.double()), weight, padding=1, groups=groups)
        off = float((y.double() - want).norm() / want.norm())
        if not off <= 1e-5:
            return f"on this CPU its sums are off by {off:.1%} with weights at both ends of {fmt}"
    return None
