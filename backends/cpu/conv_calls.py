"""Calls of a convolution's kernels, bound to the memory that they work on; see `calls.py`.

x  →  Image  →  y            RoundCall (`images.py`), ConvCall
x  →  Image  →  Image  →  y  where a convolution hands the codes of its result on (`hand`)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompiler.backends.cpu import winograd
from qcompiler.backends.cpu.calls import ALONE, ALONE_ROWS, Parameters, address
from qcompiler.backends.cpu.codegen import depthwise, layout
from qcompiler.backends.cpu.codegen.conv import conv, ends_early
from qcompiler.backends.cpu.codegen.dots import in_16_bits
from qcompiler.backends.cpu.codegen.isa import host
from qcompiler.backends.cpu.codegen.mean import mean
from qcompiler.backends.cpu.codegen.patches import patches
from qcompiler.backends.cpu.codegen.tile import Spec
from qcompiler.backends.cpu.codegen.widen import widen
from qcompiler.backends.cpu.codegen.winograd import winograd as fewer_products
from qcompiler.backends.cpu.images import Image, Scratch, room, rounding_of, starts
from qcompiler.backends.cpu.window import Window, copied, geometry, inside
from qcompiler.formats import QFormat

STRIPS = (384, 96)
"""Outputs that a thread computes at a time: fewer where each would not have several."""


def _spec(
    bits: int,
    half: bool,
    zeros: bool,
    shifted: bool,
    residual: bool,
    behind: str,
    hand: str,
    floats: bool,
    ready: bool,
) -> Spec:
    codes = None
    if hand:
        rounding = rounding_of(hand)
        codes = (rounding.qmin, rounding.qmax)
    return Spec(bits, 0, half, zeros, False, ready, shifted, residual, behind, codes, floats)


class ConvCall:
    """y = behind(image ∗ Ŵ + b + residual), and its codes in `hand`."""

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
        behind: str = "",
        hand: Image | None = None,
    ) -> None:
        """`y` and `residual` (batch, height, width, whole blocks of outputs) float32, contiguous;
        y may be left out where there is a `hand`, which lies as y does."""
        weight, scale, zero, start, bias, *_ = parameters
        isa, apart = host(), depthwise.is_packed(weight)
        bits = depthwise.BITS if apart else QFormat.parse(format).bits
        fewer = not apart and winograd.serves(isa.name, bits, image, window, zero is not None)
        gathers = not apart and copied(image.channels, window.taps)
        ready = in_16_bits(isa, bits) and not fewer
        spec = _spec(
            bits, scale.dtype == torch.float16, zero is not None, start is not None,
            residual is not None, behind, hand.activation if hand else "", y is not None, ready,
        )  # fmt: skip
        at = geometry(image.batch, image.height, image.width, image.padding, window)
        tokens, runs = at.places.numel(), at.runs.numel()
        blocks, chunks = weight.shape[:2]
        row = layout.CHUNK * chunks if gathers else 0
        inputs, taps, held = (
            (image.channels * window.taps, 1, image.channels * window.taps)
            if gathers
            else (image.channels, window.taps, image.pitch)
        )
        read, units = row or held, 0
        if not (fewer or apart) and ends_early(isa, spec):
            units = -(-inputs // (4 * spec.unit))
            read = 4 * spec.unit * units
        pixel, pixels = (row, tokens) if gathers else (image.pitch, image.pixels)
        threads = torch.get_num_threads() if tokens * weight.numel() > ALONE else 1
        tiles = winograd.Tiling.of(image, window, threads) if fewer else None
        sizes = (
            4 * tokens, 4 * tokens, tokens * row, 2 * pixel * pixels if ready else 0,
            tiles.bytes * threads if tiles else 0,
        )  # fmt: skip
        total, scales, patch, wide, work = starts(scratch(room(sizes)), sizes)
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
            runs, image.channels * window.taps // runs, row, taps * (read - held),
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
            address(y), x, total, scales, shared.data_ptr(),
            scale.data_ptr(), address(zero), bias.data_ptr(), address(residual), address(start),
            image.point, places.data_ptr(), at.taps.data_ptr(), *into, targets.data_ptr(),
        )  # fmt: skip
        numbers = (
            chunks, 0, 64 * blocks, 64 * blocks, taps, pixel, hand.pitch if hand else 0, units,
        )  # fmt: skip
        if tiles:
            self._product = fewer_products(isa, spec).bound(
                *frame, tiles.corners.data_ptr(), work, *numbers, blocks, *tiles.numbers, threads
            )
        else:
            long, short = STRIPS
            strip = long if threads == 1 or tokens * blocks > 16 * long * threads else short
            kernel = depthwise.depthwise if apart else conv
            self._product = kernel(isa, spec).bound(
                *frame, *numbers, tokens, blocks, strip, threads
            )

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
