"""Whether the generated convolution pays: it runs beside torch's in floating point.

On one random image of the site's own size, whose channels are last in memory, as they are between
convolutions (`fuse_conv.py`). Where scales are known beforehand both leave codes for the next one,
and the kernel reads those that the one before it left: that is what they do in a program
(`executor_conv.py`), and half of the time of a small convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import cast

import torch
from torch import Tensor, fx

from qcompiler.backends.cpu.calls import Parameters, scratch
from qcompiler.backends.cpu.choose import SECONDS
from qcompiler.backends.cpu.choose_conv import CLAIMS, NAME, prepare, refuses, value_of
from qcompiler.backends.cpu.codegen.depthwise import is_packed
from qcompiler.backends.cpu.conv_calls import ConvCall
from qcompiler.backends.cpu.convolution import channels_last
from qcompiler.backends.cpu.fuse_conv import CLAMPS, CONV, FUNCTIONS
from qcompiler.backends.cpu.images import Image, RoundCall
from qcompiler.backends.cpu.kernels import Call, Static, instructions
from qcompiler.backends.cpu.window import Pair, Window, pitch
from qcompiler.costs.cache import Cache, cache_folder, environment
from qcompiler.formats import Scheme
from qcompiler.rounding import nearest
from qcompiler.sites import KINDS, Site
from qcompiler.timing import floors
from qcompiler.vectors import window_of

IMAGE = 56
"""Height and width of an image whose size is not known."""
BETWEEN = {*FUNCTIONS, *CLAMPS, torch.ops.aten.add.Tensor, torch.ops.qc.fake_quantize.default}
"""Operators that a convolution does besides, so that codes go from one to the next."""


def seconds(site: Site, scheme: Scheme) -> dict[str, float]:
    """`conv` and `float` → seconds of one image; nothing where there is no choice."""
    if not any(c.fits(site, scheme) for c in CLAIMS) or refuses(site, scheme):
        return {}
    shape = tuple(int(n) for n in site.weight.meta["val"].shape)
    window, value = window_of(site), value_of(site)
    size = tuple(n if isinstance(n, int) else IMAGE for n in value.shape[2:])
    race = _Race(shape, window.groups, size, Window.of(*window[:4]), scheme, value.dtype)
    return dict(_seconds(race, _follows(site), torch.get_num_threads()))


def _follows(site: Site) -> bool:
    """Whether a convolution is before it, and nothing between that it does not do besides."""
    waiting: list[object] = [site.x]
    seen: set[object] = set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.target is CONV or (node.target in KINDS and KINDS[node.target].name == "conv"):
            return True
        if node.target in BETWEEN:
            waiting += node.args[:2]
    return False


@lru_cache(maxsize=1024)
def _seconds(race: _Race, follows: bool, threads: int) -> tuple[tuple[str, float], ...]:
    cache = Cache(cache_folder("cpu"), environment("cpu"))
    key = f"conv {race.key} {'behind another ' if follows else ''}{instructions()}"
    kept = cache.get(key)
    if not isinstance(kept, dict) or set(kept) != {NAME, "float"}:
        kept = floors(race.runs(follows), seconds=SECONDS)
        cache.put(key, kept)
    return tuple((str(name), float(value)) for name, value in kept.items())


@dataclass(frozen=True)
class _Race:
    """A convolution of these sizes and formats."""

    shape: tuple[int, ...]
    """Of its weight."""
    groups: int
    size: tuple[int, ...]
    """Of its image."""
    window: Window
    scheme: Scheme
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """What others of the same sizes and formats share."""
        sizes = (self.shape, self.groups, self.size, tuple(self.window))
        return f"{sizes} {self.scheme} {self.dtype}"

    def runs(self, follows: bool) -> dict[str, Callable[[], object]]:
        """Both; `follows` is whether the kernel finds its input rounded."""
        generator = torch.Generator().manual_seed(0)  # the user's own stays as it is
        activation, weight = self.scheme.activation, self.scheme.weight
        assert activation is not None and weight is not None
        channels = self.shape[1] * self.groups
        static = Static()
        if not activation.dynamic:
            zero = None if activation.symmetric else torch.zeros(1, dtype=torch.int16)
            static = Static(torch.tensor([0.05]), zero)
        rows = torch.randn(self.shape[0], prod(self.shape[1:]), generator=generator)
        q = nearest(rows, weight.by_rows)
        call = prepare(q, channels, None, activation, static, self.window)
        x = torch.randn(1, channels, *self.size, generator=generator).to(self.dtype)
        x = x if x.ndim == 3 else x.contiguous(memory_format=torch.channels_last)
        numbers = q.dequantize().reshape(self.shape).to(self.dtype)
        floating = partial(self._floating, x, numbers, static)
        if activation.dynamic or x.ndim == 3 or x.dtype != torch.float32:
            kernel = partial(call.operator, x, *call.parameters.values(), *call.constants)
            return {NAME: partial(kernel, last=True), "float": floating}
        return self._handed(x, call, floating, follows)

    def _floating(self, x: Tensor, weight: Tensor, static: Static) -> Tensor:
        activation = str(self.scheme.activation)
        rounded = torch.ops.qc.fake_quantize(x, activation, static.scale, static.zero)
        stride, padding, dilation = (v[-len(self.size) :] for v in self.window[1:])
        convolve = torch.conv1d if x.ndim == 3 else torch.conv2d
        return convolve(rounded, weight, None, stride, padding, dilation, self.groups)

    def _handed(
        self, x: Tensor, call: Call, floating: Callable[[], Tensor], follows: bool
    ) -> dict[str, Callable[[], object]]:
        """Both leave codes for a next convolution."""
        parameters = cast("Parameters", tuple(call.parameters.values()))
        weight, *_, scale, zero = parameters
        memory: list[Tensor] = []

        def take(size: int) -> int:
            memory.append(torch.empty(size, dtype=torch.uint8))
            return memory[-1].data_ptr()

        def image(x: Tensor, padding: Pair, pitch: int) -> Image:
            batch, channels, height, width = x.shape
            activation = str(self.scheme.activation)
            return Image(
                batch, height, width, channels, padding, pitch, activation, scale, zero, take
            )  # fmt: skip

        apart = is_packed(weight)
        first = image(x, self.window.padding, pitch(x.shape[1], self.window.taps, apart))
        y = floating()
        following = image(y, (0, 0), pitch(y.shape[1], 1))
        start = RoundCall(channels_last(x), first, scratch)
        start()
        product = ConvCall(
            first, None, parameters, str(call.constants[0]), self.window, scratch, hand=following
        )  # fmt: skip

        def kernel() -> list[Tensor]:
            if not follows:
                start()
            product()
            return memory  # is in use as long as this function is

        def library() -> None:
            RoundCall(channels_last(floating()), following, scratch)()

        return {NAME: kernel, "float": library}
