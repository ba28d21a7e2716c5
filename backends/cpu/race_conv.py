"""Whether the generated convolution pays: it runs beside torch's in floating point.

On one random image of the site's own size, whose channels are last in memory, as they are between
convolutions (`fuse_conv.py`). Where codes are handed on in a program (`executor_conv.py`) they are
here: behind another generated convolution the kernel finds them, before one both leave them. That
is half of the time of a small convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import NamedTuple, cast

import torch
from torch import Tensor, fx

from qcompiler.backends.cpu.calls import Parameters, scratch
from qcompiler.backends.cpu.choose import SECONDS
from qcompiler.backends.cpu.choose_conv import CLAIMS, NAME, prepare, refuses, value_of
from qcompiler.backends.cpu.codegen import layout
from qcompiler.backends.cpu.codegen.depthwise import is_packed
from qcompiler.backends.cpu.conv_calls import ConvCall
from qcompiler.backends.cpu.convolution import channels_last
from qcompiler.backends.cpu.executor_conv import X_SCALE
from qcompiler.backends.cpu.fuse_conv import CONV, function_of
from qcompiler.backends.cpu.images import FrameCall, Image, RoundCall
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
ADD, ROUND = torch.ops.aten.add.Tensor, torch.ops.qc.fake_quantize.default


def seconds(site: Site, scheme: Scheme) -> dict[str, float]:
    """`conv` and `float` → seconds of one image; nothing where there is no choice."""
    if not any(c.fits(site, scheme) for c in CLAIMS) or refuses(site, scheme):
        return {}
    shape = tuple(int(n) for n in site.weight.meta["val"].shape)
    window, value = window_of(site), value_of(site)
    size = tuple(n if isinstance(n, int) else IMAGE for n in value.shape[2:])
    race = _Race(shape, window.groups, size, Window.of(*window[:4]), scheme, value.dtype)
    ends = _Ends(_finds(site), _leaves(site))
    return dict(_seconds(race, ends, torch.get_num_threads()))


class _Ends(NamedTuple):
    """Where codes are handed on."""

    finds: bool
    """The kernel finds its input rounded."""
    leaves: bool
    """The result is left as codes."""


def _finds(site: Site) -> bool:
    """Whether a generated convolution is before it, and nothing between that it does not do
    besides. (Sites are lowered in the order of the graph: what is not yet, stays as it is.)"""
    return any(n.target is CONV for n in _reached(site.x, lambda node: node.all_input_nodes))


def _leaves(site: Site) -> bool:
    """The same behind it, for one that reads codes whose scale is known; it may be lowered yet."""
    nodes = list(_reached(site.node, lambda node: list(node.users)))
    if any(n.target is CONV and n.args[X_SCALE] is not None for n in nodes[1:]):
        return True
    rounded = [n for n in nodes if n.target is ROUND and len(n.args) > 2 and n.args[2] is not None]
    return any(
        u.target in KINDS and KINDS[u.target].name == "conv" for r in rounded for u in r.users
    )


def _reached(start: fx.Node | None, beyond: Callable[[fx.Node], list[fx.Node]]) -> list[fx.Node]:
    """`start` and what comes beyond it, through what a convolution does besides: one of each."""
    found = edge = [] if start is None else [start]
    for _ in (ADD, "a function", ROUND):
        through = [n for n in edge if n is start or n.target in (ADD, ROUND) or function_of(n)]
        edge = [n for node in through for n in beyond(node)]
        found = [*found, *edge]
    return found


@lru_cache(maxsize=1024)
def _seconds(race: _Race, ends: _Ends, threads: int) -> tuple[tuple[str, float], ...]:
    cache = Cache(cache_folder("cpu"), environment("cpu"))
    key = f"conv {race.key} {'codes' if ends.finds else 'numbers'} to "
    key += f"{'codes' if ends.leaves else 'numbers'} {instructions()}"
    kept = cache.get(key)
    if not isinstance(kept, dict) or set(kept) != {NAME, "float"}:
        kept = floors(race.runs(ends), seconds=SECONDS)
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

    def runs(self, ends: _Ends) -> dict[str, Callable[[], object]]:
        """Both."""
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
        return self._handed(x, call, floating, ends)

    def _floating(self, x: Tensor, weight: Tensor, static: Static) -> Tensor:
        activation = str(self.scheme.activation)
        rounded = torch.ops.qc.fake_quantize(x, activation, static.scale, static.zero)
        stride, padding, dilation = (v[-len(self.size) :] for v in self.window[1:])
        convolve = torch.conv1d if x.ndim == 3 else torch.conv2d
        return convolve(rounded, weight, None, stride, padding, dilation, self.groups)

    def _handed(
        self, x: Tensor, call: Call, floating: Callable[[], Tensor], ends: _Ends
    ) -> dict[str, Callable[[], object]]:
        """Both as in a settled program, with codes at these ends."""
        parameters = cast("Parameters", tuple(call.parameters.values()))
        weight, *_, scale, zero = parameters
        memory: list[Tensor] = []

        def take(size: int) -> int:
            memory.append(torch.empty(size, dtype=torch.uint8))
            return memory[-1].data_ptr()

        def image(x: Tensor, padding: Pair, pitch: int, summed: bool) -> Image:
            batch, channels, height, width = x.shape
            activation = str(self.scheme.activation)
            return Image(
                batch, height, width, channels, padding, pitch, activation, scale, zero, take,
                summed=summed,
            )  # fmt: skip

        apart = is_packed(weight)
        wide = pitch(x.shape[1], self.window.taps, apart)
        first = image(x, self.window.padding, wide, not apart)
        start: Callable[[], None] = RoundCall(channels_last(x), first, scratch)
        start()
        if ends.finds:
            start = FrameCall(first, layout.padded(x.shape[1], layout.OUTPUTS))
        result = channels_last(floating())
        following = image(result.permute(0, 3, 1, 2), (0, 0), pitch(result.shape[3], 1), True)
        y = torch.empty(*result.shape[:3], layout.OUTPUTS * weight.shape[0])
        product = ConvCall(
            first, None if ends.leaves else y, parameters, str(call.constants[0]), self.window,
            scratch, hand=following if ends.leaves else None,
        )  # fmt: skip

        def kernel() -> list[Tensor]:
            start()
            product()
            return [*memory, y]  # they are in use as long as this function is

        def library() -> Tensor:
            found = floating()
            if ends.leaves:
                RoundCall(channels_last(found), following, scratch)()
            return found

        return {NAME: kernel, "float": library}
