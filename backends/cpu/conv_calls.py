"""Calls of a convolution's kernels, bound to the memory that they work on; see `calls.py`.

x  →  Image  →  y            RoundCall, ConvCall
x  →  Image  →  Image  →  y  where a convolution hands the codes of its result on (`hand`)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from qcompiler.backends.cpu import winograd
from qcompiler.backends.cpu.calls import ALONE, ALONE_ROWS, Parameters
from qcompiler.backends.cpu.codegen import layout
from qcompiler.backends.cpu.codegen.conv import conv
from qcompiler.backends.cpu.codegen.dots import in_16_bits
from qcompiler.backends.cpu.codegen.isa import host
from qcompiler.backends.cpu.codegen.mean import mean
from qcompiler.backends.cpu.codegen.patches import patches
from qcompiler.backends.cpu.codegen.pixels import borders, largest, pixels, scales
from qcompiler.backends.cpu.codegen.rows import Rounding
from qcompiler.backends.cpu.codegen.tile import Spec
from qcompiler.backends.cpu.codegen.widen import widen
from qcompiler.backends.cpu.codegen.winograd import winograd as fewer_products
from qcompiler.backends.cpu.window import Pair, Window, copied, geometry, inside
from qcompiler.formats import QFormat

STRIPS = (384, 96)
"""Outputs that a thread computes at a time: fewer where each would not have several."""
Scratch = Callable[[int], int]
"""Address of so many bytes to work in."""


@lru_cache(maxsize=64)
def rounding_of(activation: str) -> Rounding:
    """How numbers are rounded; unsigned codes are moved by 128."""
    fmt = QFormat.parse(activation)
    lower = 0 if fmt.signed else 128
    low, high = fmt.qmin - lower, fmt.qmax - lower
    return Rounding(0, low, high, fmt.top, fmt.clip, static=not fmt.dynamic)


class Image:
    """Memory for the codes of images (batch, height, width, channels) with their padding, for the
    sums of pixels and scales: see `codegen/pixels.py`."""

    def __init__(
        self,
        batch: int,
        height: int,
        width: int,
        channels: int,
        padding: Pair,
        pitch: int,
        activation: str,
        x_scale: Tensor | None,
        x_zero: Tensor | None,
        memory: Scratch,
    ) -> None:
        """`pitch` is bytes of a pixel's codes; without `x_scale` scales are found."""
        fmt = QFormat.parse(activation)
        self.batch, self.height, self.width, self.channels = batch, height, width, channels
        self.padding, self.pitch, self.activation = padding, pitch, activation
        self.full = (height + 2 * padding[0], width + 2 * padding[1])
        self.pixels = batch * self.full[0] * self.full[1]
        self.alike = 1 if fmt.dynamic and fmt.block is not None else batch
        """Images that share a scale."""
        self._held = (x_scale, x_zero)
        beyond = self.full[1] + 1  # pixels that tiles of two may reach over its end
        sizes = ((self.pixels + beyond) * pitch, 4 * self.pixels, 4 * batch)
        self.codes, self.sums, found = _starts(memory(_total(sizes)), sizes)
        self.scale = found if x_scale is None else x_scale.data_ptr()
        self.point = _address(x_zero)
        """Address of the zero point, or 0."""


def _starts(base: int, sizes: tuple[int, ...]) -> list[int]:
    """Where parts of these sizes begin, one behind the other, each at a line of a cache."""
    found = []
    for size in sizes:
        found.append(base)
        base += layout.padded(size, 64)
    return found


def _total(sizes: tuple[int, ...]) -> int:
    return sum(layout.padded(n, 64) for n in sizes)


class RoundCall:
    """image = round(x), x (batch, height, width, channels) float32 and contiguous."""

    def __init__(self, x: Tensor, image: Image, scratch: Scratch) -> None:
        how = rounding_of(image.activation)
        lines, alike = image.batch * image.height, image.alike * image.height
        threads = torch.get_num_threads() if x.numel() > ALONE_ROWS else 1
        self._held = (x, image)
        self._calls: list[Callable[[], None]] = []
        if not how.static:
            most, width = scratch(4 * lines), image.width * image.channels
            self._calls = [
                largest(host()).bound(x.data_ptr(), most, lines, width, threads),
                scales(host(), how).bound(most, image.scale, lines // alike, alike, 1),
            ]
        self._calls.append(
            pixels(host(), how).bound(
                x.data_ptr(), image.codes, image.sums, image.scale, image.point,
                image.batch, image.height, image.width, image.channels, *image.padding,
                *image.full, image.pitch, alike, threads,
            )
        )  # fmt: skip

    def __call__(self) -> None:
        """Run it."""
        for call in self._calls:
            call()


class FrameCall:
    """The padding and the sums of an image whose codes were handed on, `written` bytes a pixel."""

    def __init__(self, image: Image, written: int) -> None:
        threads = torch.get_num_threads() if image.pixels * image.pitch > ALONE_ROWS else 1
        self._held = image
        self._run = borders(host()).bound(
            0, image.codes, image.sums, 0, image.point,
            image.batch, image.height, image.width, written, *image.padding, *image.full,
            image.pitch, 1, threads,
        )  # fmt: skip

    def __call__(self) -> None:
        """Run it."""
        self._run()


@lru_cache(maxsize=256)
def _spec(
    format: str,
    half: bool,
    zeros: bool,
    shifted: bool,
    residual: bool,
    relu: bool,
    hand: str,
    floats: bool,
    ready: bool,
) -> Spec:
    codes = None
    if hand:
        rounding = rounding_of(hand)
        codes = (rounding.qmin, rounding.qmax)
    bits = QFormat.parse(format).bits
    return Spec(bits, 0, half, zeros, False, ready, shifted, residual, relu, codes, floats)


class ConvCall:
    """y = relu(image ∗ Ŵ + b + residual), and its codes in `hand`."""

    def __init__(
        self,
        image: Image,
        y: Tensor | None,
        parameters: Parameters,
        format: str,
        window: Window,
        scratch: Scratch,
        *,
        residual: Tensor | None = None,
        relu: bool = False,
        hand: Image | None = None,
    ) -> None:
        """`y` and `residual` (batch, height, width, whole blocks of outputs) float32, contiguous;
        y may be left out where there is a `hand`, which lies as y does."""
        weight, scale, zero, start, bias, *_ = parameters
        bits, isa = QFormat.parse(format).bits, host()
        fewer = winograd.serves(isa.name, bits, image, window, zero is not None)
        gathers = copied(image.channels, window.taps)
        ready = in_16_bits(isa, bits) and not fewer
        spec = _spec(
            format, scale.dtype == torch.float16, zero is not None, start is not None,
            residual is not None, relu, hand.activation if hand else "", y is not None, ready,
        )  # fmt: skip
        at = geometry(image.batch, image.height, image.width, image.padding, window)
        tokens, runs = at.places.numel(), at.runs.numel()
        blocks, chunks = weight.shape[:2]
        row = layout.CHUNK * chunks if gathers else 0
        pixel, pixels = (row, tokens) if gathers else (image.pitch, image.pixels)
        threads = torch.get_num_threads() if tokens * weight.numel() > ALONE else 1
        tiles = winograd.Tiling.of(image, window, threads) if fewer else None
        sizes = (
            4 * tokens, 4 * tokens, tokens * row, 2 * pixel * pixels if ready else 0,
            tiles.bytes * threads if tiles else 0,
        )  # fmt: skip
        total, scales, patch, wide, work = _starts(scratch(_total(sizes)), sizes)
        targets, into = at.places, (0, 0, 0, 0)
        if hand is not None:
            targets = inside(hand.batch, hand.height, hand.width, hand.padding)
            into = (hand.codes, hand.sums, hand.scale, hand.point)
        self.writes = y is not None
        """Whether the result is written as numbers."""
        self._gather = patches(isa, gathers, hand is not None).bound(
            image.sums, image.scale, total, scales, at.places.data_ptr(), at.taps.data_ptr(),
            image.codes, patch, at.runs.data_ptr(), image.point, into[1], targets.data_ptr(),
            tokens, window.taps, tokens // image.batch * image.alike, image.pitch,
            runs, image.channels * window.taps // runs, row,
            threads if tokens * window.taps > ALONE_ROWS else 1,
        )  # fmt: skip
        x = patch if gathers else image.codes
        self._widen = None
        if ready:
            self._widen = widen(isa).bound(
                x, wide, pixels, pixel, pixel, 2 * pixel, threads if tokens > ALONE_ROWS else 1
            )
            x, pixel = wide, 2 * pixel
        places, shared = at.numbers if gathers else at.places, weight
        if tiles:
            places, shared = tiles.places, winograd.weights(weight, bits)
        self._held = (image, y, parameters, residual, hand, at, targets, tiles, shared)
        frame = (
            _address(y), x, total, scales, shared.data_ptr(),
            scale.data_ptr(), _address(zero), bias.data_ptr(), _address(residual), _address(start),
            image.point, places.data_ptr(), at.taps.data_ptr(), *into, targets.data_ptr(),
        )  # fmt: skip
        numbers = (
            chunks, 0, 64 * blocks, 64 * blocks, 1 if gathers else window.taps,
            pixel, hand.pitch if hand else 0,
        )  # fmt: skip
        if tiles:
            self._product = fewer_products(isa, spec).bound(
                *frame, tiles.corners.data_ptr(), work, *numbers, blocks, *tiles.numbers, threads
            )
        else:
            long, short = STRIPS
            strip = long if threads == 1 or tokens * blocks > 16 * long * threads else short
            self._product = conv(isa, spec).bound(*frame, *numbers, tokens, blocks, strip, threads)

    def __call__(self) -> None:
        """Run it."""
        self._gather()
        if self._widen:
            self._widen()
        self._product()


class MeanCall:
    """y (batch, channels) = the mean of x (batch, height, width, channels), float32, contiguous."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        batch, height, width, channels = x.shape
        threads = torch.get_num_threads() if x.numel() > ALONE_ROWS else 1
        self._held = (x, y)
        self._run = mean(host()).bound(
            x.data_ptr(), y.data_ptr(), batch, height * width, channels, threads
        )

    def __call__(self) -> None:
        """Run it."""
        self._run()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
