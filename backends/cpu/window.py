"""How a convolution walks over an image, and where its outputs find their inputs.

Pixels of an image are numbered with its padding, image after image, line after line.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qcompiler.backends.cpu.codegen import layout

COPIED = 0.8
"""Patches are copied where that leaves so much of the inputs, padded to whole chunks, or less."""
Pair = tuple[int, int]


class Window(NamedTuple):
    """Vertical and horizontal; of height 1 for a line."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @classmethod
    def of(cls, *sizes: Sequence[int]) -> Window:
        """Of sizes for two axes, or for one."""
        return cls(*(_pair(one, s) for one, s in zip((1, 1, 0, 1), sizes, strict=True)))

    @property
    def taps(self) -> int:
        """Pixels that an output reads."""
        return self.kernel[0] * self.kernel[1]

    def output(self, height: int, width: int) -> Pair:
        """Sizes of what comes of an image."""
        each = zip((height, width), *self, strict=True)
        y, x = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each)
        return y, x


def _pair(first: int, sizes: Sequence[int]) -> Pair:
    return (first, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def copied(channels: int, taps: int) -> bool:
    """Whether patches are copied: where padding the channels of each tap would cost more."""
    together = layout.padded(channels * taps, layout.CHUNK)
    return together <= COPIED * taps * layout.padded(channels, layout.CHUNK)


def pitch(channels: int, taps: int, depthwise: bool = False) -> int:
    """Bytes of a pixel's codes."""
    dense = not depthwise and copied(channels, taps)
    return channels if dense else layout.padded(channels, layout.CHUNK)


class Geometry(NamedTuple):
    """Where outputs find their inputs."""

    places: Tensor
    """Pixel of each output's first tap."""
    taps: Tensor
    """Pixels from the first tap to each, and to the last once more: some read them in pairs."""
    runs: Tensor
    """The same for taps that lie together in memory."""
    numbers: Tensor
    """0, 1, 2, …: the places of patches."""


@lru_cache(maxsize=64)
def geometry(batch: int, height: int, width: int, padding: Pair, window: Window) -> Geometry:
    """Of images of this size, held with at least the padding that the window wants."""
    size = window.output(height, width)
    full = width + 2 * padding[1]
    y, x = (
        torch.arange(n) * s + have - p
        for n, s, have, p in zip(size, window.stride, padding, window.padding, strict=True)
    )
    images = torch.arange(batch) * (height + 2 * padding[0]) * full
    places = images[:, None, None] + y[:, None] * full + x
    y, x = (torch.arange(n) * d for n, d in zip(window.kernel, window.dilation, strict=True))
    taps = y[:, None] * full + x
    runs = taps[:, :1] if window.dilation[1] == 1 else taps
    taps = torch.cat([taps.flatten(), taps.flatten()[-1:]])
    parts = (places, taps, runs, torch.arange(places.numel()))
    return Geometry(*(p.flatten().contiguous() for p in parts))


def inside(batch: int, height: int, width: int, padding: Pair) -> Tensor:
    """The pixels of images of this size that are no padding."""
    whole = Window((1, 1), (1, 1), (0, 0), (1, 1))
    return geometry(batch, height, width, padding, whole).places
