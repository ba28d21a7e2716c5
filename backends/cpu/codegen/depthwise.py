"""The kernel of a depthwise convolution: each channel has taps of its own, and no other reads it.

    y[m, c] = s[c] sx[m] (Σ_t w[c, t] x[place[m] + tap[t], c] - z' Σ_t w[c, t]) + …

Weights are int16, less their zero point, so that only z', that of x, is left to see to. Taps come
in pairs: two products of 16 bits are one sum of 32, where 33,025 taps have room (255 · 255 each).

    weight (channels, taps)  →  int16 (blocks of 16 channels, pairs of taps, 16, 2)

Frames, places of outputs and their ends are those of `conv.py`; `chunks` are pairs of taps.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from functools import lru_cache
from typing import ClassVar

import torch
from llvmlite import ir
from torch import Tensor

from qcompiler.backends.cpu.codegen import layout
from qcompiler.backends.cpu.codegen.conv import PLACES, SIZES, Strips, Taps
from qcompiler.backends.cpu.codegen.dots import MADD, Dots
from qcompiler.backends.cpu.codegen.emit import I8, I16, I32, I64, Code, Value, vector
from qcompiler.backends.cpu.codegen.frame import Kernel, entry, share
from qcompiler.backends.cpu.codegen.isa import Isa
from qcompiler.backends.cpu.codegen.tile import Spec, Tile

BITS = 16
"""Of a code of such a weight."""
TILES = {name: ((4, 1), (1, 1)) for name in ("vnni", "avx2", "neon")} | {"plain": ((1, 1),)}
"""(tokens, blocks) of a tile, as in `linear.TILES`."""
MADDS = {"avx2": MADD, "vnni": "llvm.x86.avx512.pmaddw.d.512"}
"""Where there is one: two products of int16 to a lane, summed in 32 bits."""


def pack(codes: Tensor) -> Tensor:
    """Codes (channels, taps) less their zero point, as the kernel reads them."""
    channels, taps = codes.shape
    full = torch.zeros(
        layout.padded(channels, layout.OUTPUTS), layout.padded(taps, 2), dtype=torch.int16
    )
    full[:channels, :taps] = codes
    return full.reshape(-1, layout.OUTPUTS, full.shape[1] // 2, 2).transpose(1, 2).contiguous()


def is_packed(weight: Tensor) -> bool:
    """Whether a convolution's weight lies as `pack` lays it; others are bytes (`layout.py`)."""
    return weight.dtype == torch.int16


@lru_cache(maxsize=64)
def depthwise(isa: Isa, spec: Spec) -> Kernel:
    """The kernel for `spec`. Frame: that of `conv.conv`."""
    return Kernel(module(isa, spec), isa, len(PLACES) + len(SIZES) + 1)


def module(isa: Isa, spec: Spec) -> ir.Module:
    """Its IR."""
    made = ir.Module("depthwise")
    entry(made, SIZES, PLACES, _Rows(made, isa, spec).write)
    return made


class _PairsOfTaps(Dots):
    """Two taps of each channel at a time."""

    def start(self, cells: Iterable[Hashable], total: Value, zero: int) -> None:
        for cell in cells:
            self.sums[cell].set(ir.Constant(self.kind, None))

    def add(self, cell: Hashable, codes: Value, x: Value) -> None:
        name = MADDS.get(self.isa.name)
        if name is not None:
            self.more(cell, self.code.call(name, self.kind, codes, x))
            return
        b, lanes = self.code.b, self.isa.lanes
        wide = vector(I32, 2 * lanes)
        products = b.mul(b.sext(codes, wide), b.sext(x, wide))
        nothing = ir.Constant(wide, ir.Undefined)
        for first in (0, 1):
            order = ir.Constant(vector(I32, lanes), [2 * i + first for i in range(lanes)])
            self.more(cell, b.shuffle_vector(products, nothing, order))


class _Depthwise(Taps):
    """A tile of outputs whose channels are read at the place that they are written to."""

    def _products(self, isa: Isa, spec: Spec) -> type[Dots]:
        return _PairsOfTaps

    def _begin(self, group: Value, groups: Value) -> None:
        Tile._begin(self, group, groups)  # sums are short: nothing would come ahead of its use

    def _chunks(self, first: Value, count: int | Value) -> None:
        code, given, lanes = self.code, self.given, self.isa.lanes
        starts = [
            code.mul(code.load(I64, given["places"], 8 * m), given["pitch"])
            for m in range(self.tokens)
        ]
        with code.loop(0, count) as pair:
            taps = [
                code.mul(
                    code.load(I64, given["taps"], code.add(code.mul(pair, 16), 8 * i)),
                    given["pitch"],
                )
                for i in (0, 1)
            ]
            for n in range(self.blocks):
                block = code.mul(code.mul(given["chunks"], 64), n)
                at = code.add(block, code.mul(pair, 64))
                weights = [
                    code.load(
                        vector(I16, 2 * lanes), given["weight"], code.add(at, v * self.isa.bytes)
                    )
                    for v in range(self.vectors)
                ]
                for m in range(self.tokens):
                    both = [
                        code.load(vector(I8, 16), given["x"], code.add(starts[m], tap, 16 * n))
                        for tap in taps
                    ]
                    for v, weight in enumerate(weights):
                        self.sums.add((m, n, v), weight, self._interleaved(both, v))

    def _interleaved(self, taps: list[Value], v: int) -> Value:
        """int16 of two taps for each channel of a vector."""
        b, lanes = self.code.b, self.isa.lanes
        order = [n for i in range(v * lanes, (v + 1) * lanes) for n in (i, 16 + i)]
        codes = b.shuffle_vector(*taps, ir.Constant(vector(I32, 2 * lanes), order))
        return b.sext(codes, vector(I16, 2 * lanes))


class _Rows(Strips):
    """Tiles over outputs, which threads share; a pixel's channels one block after the other."""

    tile: ClassVar[type[Tile]] = _Depthwise
    sizes: ClassVar[Mapping[str, tuple[tuple[int, int], ...]]] = TILES

    def write(self, code: Code, given: Mapping[str, Value], thread: Value, threads: Value) -> None:
        start, stop = share(code, given["tokens"], thread, threads)
        for tokens, blocks in self._sizes:
            left = code.add(stop, code.mul(start, -1))
            end = code.add(start, code.mul(code.div(left, tokens), tokens))
            with code.loop(start, end, tokens) as token, code.loop(0, given["blocks"]) as block:
                arguments = self._arguments(code, given, token, block)
                code.b.call(self._tiles[tokens, blocks], arguments)
            start = end

    def _places(
        self, code: Code, given: Mapping[str, Value], token: Value, block: Value
    ) -> dict[str, Value]:
        row = code.mul(given["chunks"], 4 * layout.OUTPUTS)
        own = {"x": code.mul(block, layout.OUTPUTS), "weight": code.mul(block, row)}
        return super()._places(code, given, token, block) | own
