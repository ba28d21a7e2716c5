"""Which convolutions are computed by fewer products, and what that takes beforehand.

See `codegen/winograd.py`.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qcompiler.backends.cpu.codegen.winograd import CHANNELS, transformed, work_bytes
from qcompiler.backends.cpu.images import Image
from qcompiler.backends.cpu.window import Pair, Window, copied, geometry

WORK = 2**18
"""Bytes of transformed inputs that a thread works on: a part of a cache of its own."""
BITS = 5
"""The fewest bits of a code …"""
OUTPUTS = 16
"""… and of outputs: with fewer, reading the weights takes longer than multiplying them."""
_weights = WeakTensorKeyDictionary()


def serves(isa: str, bits: int, image: Image, window: Window, zeros: bool) -> bool:
    """Whether a convolution of codes of `bits`, with zero points or without, is computed so: where
    it is exact and faster. With less than 5 bits other products are nearly as fast, in a seventh of
    the memory."""
    plain = window.kernel == (3, 3) and window.stride == window.dilation == (1, 1)
    outputs = image.batch * prod(window.output(image.height, image.width))
    return (
        isa == "avx2"
        and bits >= BITS
        and plain
        and not zeros
        and not copied(image.channels, window.taps)
        and image.channels <= CHANNELS
        and outputs >= OUTPUTS
    )


def weights(packed: Tensor, bits: int) -> Tensor:
    """`transformed`, once for each weight."""
    if packed not in _weights:
        _weights[packed] = transformed(packed, bits)
    found: Tensor = _weights[packed]
    return found


class Tiling(NamedTuple):
    """Where tiles are, and how threads share them: see `codegen.winograd`."""

    places: Tensor
    corners: Tensor
    numbers: tuple[int, int, int, int, int]
    """The last of its `SIZES`, from `tiles` on."""

    @property
    def bytes(self) -> int:
        """Of memory for each thread."""
        *_, size = self.numbers
        return size

    @classmethod
    def of(cls, image: Image, window: Window, threads: int) -> Tiling:
        """Of the outputs of a window on an image."""
        places, corners = _tiles(image.batch, image.height, image.width, image.padding, window)
        count, line = places.numel(), image.full[1]
        strip = max(4, WORK // work_bytes(1, image.pitch) // 4 * 4)
        strips = -(-count // strip)
        splits = 1 if strips % threads == 0 or strips >= 4 * threads else threads
        return cls(places, corners, (count, strip, splits, line, work_bytes(strip, image.pitch)))


@lru_cache(maxsize=64)
def _tiles(
    batch: int, height: int, width: int, padding: Pair, window: Window
) -> tuple[Tensor, Tensor]:
    size = window.output(height, width)
    even = [n + n % 2 for n in size]
    outputs = torch.full((batch, *even), -1)
    outputs[:, : size[0], : size[1]] = torch.arange(batch * size[0] * size[1]).reshape(-1, *size)
    corners = outputs.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 2, 4)
    places = geometry(batch, height, width, padding, window).places.reshape(-1, *size)
    return places[:, ::2, ::2].contiguous(), corners.contiguous()
