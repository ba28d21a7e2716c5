"""Images as convolutions read them: memory for their codes, and the calls that fill it.

See `codegen/pixels.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from qcompiler.backends.cpu.calls import ALONE_ROWS, address
from qcompiler.backends.cpu.codegen import layout
from qcompiler.backends.cpu.codegen.isa import host
from qcompiler.backends.cpu.codegen.pixels import borders, largest, pixels, scales
from qcompiler.backends.cpu.codegen.rows import Rounding
from qcompiler.backends.cpu.window import Pair
from qcompiler.formats import QFormat

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
        *,
        summed: bool = True,
    ) -> None:
        """`pitch` is bytes of a pixel's codes; a dynamic format's scales are found, and written to
        memory of this image's own. Unless `summed`, pixels are not: nobody reads the sums but for
        NaN."""
        fmt = QFormat.parse(activation)
        self.batch, self.height, self.width, self.channels = batch, height, width, channels
        self.padding, self.pitch, self.activation = padding, pitch, activation
        self.summed = summed
        self.full = (height + 2 * padding[0], width + 2 * padding[1])
        self.pixels = batch * self.full[0] * self.full[1]
        self.alike = 1 if fmt.dynamic and fmt.block is not None else batch
        """Images that share a scale."""
        self._held = (x_scale, x_zero)
        beyond = self.full[1] + 1  # pixels that tiles of two may reach over its end
        sizes = ((self.pixels + beyond) * pitch, 4 * self.pixels, 4 * batch)
        self.codes, self.sums, found = starts(memory(room(sizes)), sizes)
        self.scale = found if fmt.dynamic or x_scale is None else x_scale.data_ptr()
        self.point = address(x_zero)
        """Address of the zero point, or 0."""


def starts(base: int, sizes: tuple[int, ...]) -> list[int]:
    """Where parts of these sizes begin, one behind the other, each at a line of a cache."""
    found = []
    for size in sizes:
        found.append(base)
        base += layout.padded(size, 64)
    return found


def room(sizes: tuple[int, ...]) -> int:
    """Bytes of all of them."""
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
            pixels(host(), how, image.summed).bound(
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
        self._run = borders(host(), image.summed).bound(
            0, image.codes, image.sums, 0, image.point,
            image.batch, image.height, image.width, written, *image.padding, *image.full,
            image.pitch, 1, threads,
        )  # fmt: skip

    def __call__(self) -> None:
        """Run it."""
        self._run()
