"""Which convolutions the generated kernel serves: formats, shapes, and whether it pays.

It runs beside torch's in floating point, on one random image of the site's own size that has its
channels last in memory, as it has between convolutions (`fuse_conv.py`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from math import prod

import torch
from torch import Tensor, fx

from qcompiler.backend import Capability
from qcompiler.backends.cpu import convolution, generated
from qcompiler.backends.cpu.calls import group_of
from qcompiler.backends.cpu.choose import SECONDS
from qcompiler.backends.cpu.kernels import INTEGERS, Call, Static, instructions, point_of
from qcompiler.backends.cpu.window import Window
from qcompiler.costs.cache import Cache, cache_folder, environment
from qcompiler.formats import Grid, QFormat, QTensor, Scheme
from qcompiler.rounding import nearest
from qcompiler.sites import Site
from qcompiler.timing import floors
from qcompiler.vectors import window_of

NAME = "conv"
IMAGE = 56
"""Height and width of an image whose size is not known."""
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
"""(weight, activation) formats that it must be exact with before it is used."""


def refuses(site: Site, scheme: Scheme) -> str | None:
    """Why the kernel does not serve a convolution of formats that it is made for; None if it does,
    or is not made for them."""
    if scheme.weight is None or not any(c.fits(site, scheme) for c in CLAIMS):
        return None
    if _value(site).ndim != site.weight.meta["val"].ndim:
        return "takes a batch of images; found one without a batch"
    block = scheme.activation.block if scheme.activation is not None else None
    if block is not None and len(block) != _value(site).ndim - 1:
        return f"takes one scale for each image, or for all; found {scheme.activation}"
    groups = window_of(site).groups
    if groups != 1:
        return f"takes one group of channels; found {groups}"
    if group := group_of(scheme.weight):
        return f"takes one scale for each output; found groups of {group} inputs"
    out, channels, *kernel = (int(n) for n in site.weight.meta["val"].shape)
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
    """The operator with all that it needs, for a weight (out, channels · taps)."""
    point = point_of(activation, static)
    out = q.data.shape[0]
    parameters = {
        **convolution.pack(q, channels, point)._asdict(),
        "bias": generated.pack_bias(bias, out),
        "x_scale": None if static.scale is None else static.scale.float(),
        "x_zero": None if point is None else torch.tensor([float(point)]),
    }
    constants = (str(q.format.decoded), str(activation), out, *map(list, window))
    return Call(torch.ops.qc_cpu.conv.default, parameters, constants)


def seconds(site: Site, scheme: Scheme) -> dict[str, float]:
    """`conv` and `float` → seconds of one image; nothing where there is no choice."""
    if not any(c.fits(site, scheme) for c in CLAIMS) or refuses(site, scheme):
        return {}
    shape = tuple(int(n) for n in site.weight.meta["val"].shape)
    window, value = window_of(site), _value(site)
    size = tuple(_number(n) for n in value.shape[2:])
    threads = torch.get_num_threads()
    return dict(_seconds(shape, size, Window.of(*window[:4]), scheme, threads, value.dtype))


def _value(site: Site) -> Tensor:
    assert isinstance(site.x, fx.Node)
    value: Tensor = site.x.meta["val"]
    return value


def _number(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else IMAGE


@lru_cache(maxsize=1024)
def _seconds(
    shape: tuple[int, ...],
    size: tuple[int, ...],
    window: Window,
    scheme: Scheme,
    threads: int,
    dtype: torch.dtype,
) -> tuple[tuple[str, float], ...]:
    cache = Cache(cache_folder("cpu"), environment("cpu"))
    key = f"conv {shape} {size} {tuple(window)} {scheme} {dtype} {instructions()}"
    kept = cache.get(key)
    if not isinstance(kept, dict) or set(kept) != {NAME, "float"}:
        kept = _measure(shape, size, window, scheme, dtype)
        cache.put(key, kept)
    return tuple((str(name), float(value)) for name, value in kept.items())


def _measure(
    shape: tuple[int, ...],
    size: tuple[int, ...],
    window: Window,
    scheme: Scheme,
    dtype: torch.dtype,
) -> dict[str, float]:
    assert scheme.weight is not None and scheme.activation is not None
    activation, channels = scheme.activation, shape[1]
    generator = torch.Generator().manual_seed(0)  # the user's own stays as it is
    rows = torch.randn(shape[0], prod(shape[1:]), generator=generator)
    q = nearest(rows, scheme.weight.by_rows)
    static = Static()
    if not activation.dynamic:
        zero = None if activation.symmetric else torch.zeros(1, dtype=torch.int16)
        static = Static(torch.tensor([0.05]), zero)
    call = prepare(q, channels, None, activation, static, window)
    x = torch.randn(1, channels, *size, generator=generator).to(dtype)
    flat = x.ndim == 3
    x = x if flat else x.contiguous(memory_format=torch.channels_last)
    weight = q.dequantize().reshape(shape).to(dtype)
    convolve = torch.conv1d if flat else torch.conv2d
    stride, padding, dilation = (v[-len(size) :] for v in window[1:])

    def floating() -> Tensor:
        rounded = torch.ops.qc.fake_quantize(x, str(activation), static.scale, static.zero)
        return convolve(rounded, weight, None, stride, padding, dilation)

    runs = {NAME: partial(call.operator, x, *call.parameters.values(), *call.constants, last=True)}
    return floors({**runs, "float": floating}, seconds=SECONDS)


def self_test() -> str | None:
    """Prove the kernel on this CPU with codes at both ends of their range; None, or what is wrong:
    there sums of 16 bits overflow."""
    return _proved(instructions())


@lru_cache(maxsize=8)
def _proved(instructions: str) -> str | None:
    for weight, activation in PROOFS:
        if reason := _proof(QFormat.parse(weight), QFormat.parse(activation)):
            return reason
    return None


def _proof(fmt: QFormat, activation: QFormat) -> str | None:
    shape = (32, 64 * 9)
    sign = torch.arange(shape[0] * shape[1]).reshape(shape) * 7 % 11 < 5
    extremes = torch.where(sign, fmt.qmin, fmt.qmax).to(torch.int16)
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    for data in (
        torch.full_like(extremes, fmt.qmin),
        torch.full_like(extremes, fmt.qmax),
        extremes,
    ):
        q = QTensor(data, Grid(fmt, torch.full(fmt.scale_shape(shape), 0.5)))
        x = torch.ones(1, 64, 5, 5)
        grid = Grid.fit(x, replace(activation, dynamic=True))
        static = Static() if activation.dynamic else Static(grid.scale, grid.zero)
        y = prepare(q, 64, None, activation, static, window)(x)
        weight = q.dequantize(torch.float64).reshape(shape[0], 64, 3, 3)
        want = torch.conv2d(grid.round(x.double()), weight, padding=1)
        off = float((y.double() - want).norm() / want.norm())
        if not off <= 1e-5:
            return f"on this CPU its sums are off by {off:.1%} with weights at both ends of {fmt}"
    return None
