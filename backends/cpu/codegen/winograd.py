"""3 × 3 convolutions with 2.25 times fewer products, exact: F(2 × 2, 3 × 3) in integers.

    Y = Aᵀ [ Σ_c (G g_c Gᵀ) ⊙ (Bᵀ d_c B) ] A / 4        Winograd, after Lavin and Gray (2016)

A tile is 2 × 2 outputs that read 4 × 4 pixels d. With G doubled all is in integers: inputs of 8
bits become 16 (4 · 255), weights too (9 · 127), products are summed in 32 bits, and what comes out
is four times the sum of the plain convolution, so that nothing is rounded. Sums may wrap on the
way: only the last must fit, 4 · 9 · channels · 255 · 128 < 2^31 (`CHANNELS`).

For CPUs that multiply 8 bits no faster than 16, as AVX2 without VNNI does if nothing may saturate.
Weights are transformed when the convolution is first called: 32 bytes for 9 codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from llvmlite import ir
from torch import Tensor

from qcompiler.backends.cpu.codegen import layout
from qcompiler.backends.cpu.codegen.conv import NUMBERS_OF, PLACES, Strips, Taps
from qcompiler.backends.cpu.codegen.dots import MADD
from qcompiler.backends.cpu.codegen.emit import (
    I8,
    I16,
    I32,
    I64,
    PTR,
    Code,
    Value,
    function,
    vector,
)
from qcompiler.backends.cpu.codegen.frame import Kernel, entry, share
from qcompiler.backends.cpu.codegen.isa import Isa
from qcompiler.backends.cpu.codegen.pixels import zero_of
from qcompiler.backends.cpu.codegen.tile import Spec

POINTERS = (*PLACES, "corners", "work")
"""`places` has the first pixel of each tile, `corners` its four outputs, -1 where there is none;
`work` is memory for each thread: `work_bytes`."""
SIZES = (*NUMBERS_OF, "blocks", "tiles", "strip", "splits", "line", "work_bytes")
"""`strip`: tiles whose inputs are transformed at a time; `splits`: threads that share a strip's
outputs; `line`: pixels from one line to the next."""
POSITIONS = 16
CHANNELS = 1824
"""The most channels whose sums fit."""
TILES = (4, 1)
"""Tiles that are computed at a time, large first."""
WIDE = 16
"""Channels that are transformed at a time."""


@lru_cache(maxsize=64)
def winograd(isa: Isa, spec: Spec) -> Kernel:
    """The kernel for `spec`. Frame: POINTERS, SIZES, threads. The weights are `transformed`."""
    made = ir.Module("winograd")
    entry(made, SIZES, POINTERS, _Tiles(made, isa, spec).write)
    return Kernel(made, isa, len(POINTERS) + len(SIZES) + 1)


def transformed(weight: Tensor, bits: int) -> Tensor:
    """A packed weight (blocks, chunks, 64 bits) of nine taps as int16 (blocks, 16, channels / 2,
    16, 2): positions, pairs of channels, outputs."""
    blocks, chunks = weight.shape[:2]
    codes = layout.unpack(weight, bits, blocks * layout.OUTPUTS, chunks * layout.CHUNK)
    g: Tensor = codes.to(torch.int16).sub_(1 << (bits - 1)).reshape(len(codes), 3, 3, -1)
    for axis in (1, 2):
        a, b, c = g.unbind(axis)
        g = torch.stack((2 * a, a + b + c, a - b + c, 2 * c), axis)
    g = g.reshape(blocks, layout.OUTPUTS, POSITIONS, -1, 2)
    return g.permute(0, 2, 3, 1, 4).contiguous()


def work_bytes(strip: int, channels: int) -> int:
    """Of the inputs of one thread."""
    return POSITIONS * strip * channels * 2


class _Corner(Taps):
    """One output from its sums, which `x` points to."""

    def _write(self) -> None:
        for place in self._places:
            n, v = place
            sums = self.code.load(
                vector(I32, self.isa.lanes), self.given["x"], 64 * n + v * self.isa.bytes
            )
            self.sums.sums[0, n, v].set(sums)
        self._fold(self.code.i64(0), self.code.i64(1))
        self._finish()
        self.code.b.ret_void()


class _Tiles(Strips):
    """Strips of tiles, which threads share; with few strips, parts of their outputs."""

    tile = _Corner

    def __init__(self, module: ir.Module, isa: Isa, spec: Spec) -> None:
        self._isa, self._module, self._spec = isa, module, spec
        self._corner = _Corner(module, isa, spec, 1, 1).function
        self._lanes, self._vectors = isa.lanes, 64 // isa.bytes
        self._products = {n: self._product(n) for n in TILES}

    def write(self, code: Code, given: Mapping[str, Value], thread: Value, threads: Value) -> None:
        """The parts of one thread."""
        tiles, strip, splits = given["tiles"], given["strip"], given["splits"]
        strips = code.div(code.add(tiles, strip, -1), strip)
        zero = code.b.fptosi(zero_of(code, given, "x_zero"), I16)
        work = code.at(given["work"], code.mul(thread, given["work_bytes"]))
        with code.loop(*share(code, code.mul(strips, splits), thread, threads)) as part:
            number = code.div(part, splits)
            piece = code.add(part, code.mul(code.mul(number, splits), -1))
            start = code.mul(number, strip)
            stop = code.smaller(code.add(start, strip), tiles)
            with code.loop(start, stop) as tile:
                self._spread(code, given, tile, code.add(tile, code.mul(start, -1)), zero, work)
            with code.loop(*share(code, given["blocks"], piece, splits)) as block:
                self._block(code, given, block, start, stop, work)

    def _spread(
        self,
        code: Code,
        given: Mapping[str, Value],
        tile: Value,
        at: Value,
        zero: Value,
        work: Value,
    ) -> None:
        """Bᵀ d B of one tile, all channels: 16 numbers a strip of tiles apart."""
        b, pitch = code.b, given["pitch"]
        wide = vector(I16, WIDE)
        first = code.mul(code.load(I64, given["places"], code.mul(tile, 8)), pitch)
        line = code.mul(given["line"], pitch)
        pixels = [
            [code.add(first, code.mul(line, y), code.mul(pitch, x)) for x in range(4)]
            for y in range(4)
        ]
        row = code.mul(pitch, 2)
        apart = code.mul(given["strip"], row)
        to = code.at(work, code.mul(at, row))
        middle = code.splat(zero, WIDE)
        with code.loop(0, pitch, WIDE) as channel:
            columns = []
            for x in range(4):
                places = [code.add(pixels[y][x], channel) for y in range(4)]
                codes = [code.load(vector(I8, WIDE), given["x"], place) for place in places]
                d = [b.sub(b.sext(q, wide), middle) for q in codes]
                columns.append(_transform(code, d))
            for y in range(4):
                for x, value in enumerate(_transform(code, [c[y] for c in columns])):
                    place = code.add(code.mul(apart, 4 * y + x), code.mul(channel, 2))
                    code.store(value, to, place)

    def _block(
        self,
        code: Code,
        given: Mapping[str, Value],
        block: Value,
        start: Value,
        stop: Value,
        work: Value,
    ) -> None:
        """16 outputs of the tiles of a strip."""
        channels = given["pitch"]
        weight = code.at(
            given["weight"], code.mul(block, code.mul(channels, 2 * POSITIONS * layout.OUTPUTS))
        )
        row = code.mul(channels, 2)
        apart = code.mul(given["strip"], row)
        first: Value = start
        for count in TILES:
            left = code.add(stop, code.mul(first, -1))
            last = code.add(first, code.mul(code.div(left, count), count))
            with code.b.goto_entry_block():
                sums = code.b.alloca(vector(I32, 16), POSITIONS * count)
                ends = code.b.alloca(vector(I32, 16), 4)
            sums, ends = (code.b.bitcast(place, PTR) for place in (sums, ends))
            with code.loop(first, last, count) as tile:
                x = code.at(work, code.mul(code.add(tile, code.mul(start, -1)), row))
                code.b.call(self._products[count], [x, weight, sums, channels, apart])
                for m in range(count):
                    self._gather(code, code.at(sums, 64 * POSITIONS * m), ends)
                    self._ends(code, given, code.add(tile, m), block, ends)
            first = last

    def _product(self, count: int) -> ir.Function:
        """Sums over channels of `count` tiles and 16 outputs, at each position."""
        made = function(self._module, f"product_{count}", [PTR] * 3 + [I64] * 2, inline=True)
        x, weight, sums, channels, apart = made.args
        code, kind = Code(made), vector(I32, self._lanes)
        short = vector(I16, 2 * self._lanes)
        row = code.mul(channels, 2)
        cells = [(m, v) for m in range(count) for v in range(self._vectors)]
        totals = {cell: code.variable(kind) for cell in cells}
        with code.loop(0, POSITIONS) as position:
            for cell in cells:
                totals[cell].set(ir.Constant(kind, None))
            here = code.at(x, code.mul(position, apart))
            rows = [code.at(here, code.mul(row, m)) for m in range(count)]
            codes = code.at(weight, code.mul(position, code.mul(channels, 2 * layout.OUTPUTS)))
            with code.loop(0, row, 4) as pair:
                w = [
                    code.load(short, codes, code.add(code.mul(pair, 16), v * self._isa.bytes))
                    for v in range(self._vectors)
                ]
                for m in range(count):
                    inputs = code.splat(code.load(I32, rows[m], pair), self._lanes)
                    inputs = code.b.bitcast(inputs, short)
                    for v in range(self._vectors):
                        more = code.call(MADD, kind, inputs, w[v])
                        totals[m, v].set(code.b.add(totals[m, v].get(), more))
            for m, v in cells:
                place = code.add(code.mul(position, 64), 64 * POSITIONS * m + v * self._isa.bytes)
                code.store(totals[m, v].get(), sums, place)
        code.b.ret_void()
        return made

    def _gather(self, code: Code, sums: Value, ends: Value) -> None:
        """Aᵀ M A / 4 of one tile: 16 positions to four outputs."""
        kind = vector(I32, self._lanes)
        two = code.constant(I32, 2, self._lanes)
        for v in range(self._vectors):
            at = v * self._isa.bytes
            columns = [
                _folded(code, [code.load(kind, sums, 64 * (4 * y + x) + at) for y in range(4)])
                for x in range(4)
            ]
            for y in range(2):
                for x, value in enumerate(_folded(code, [c[y] for c in columns])):
                    code.store(code.b.ashr(value, two), ends, 64 * (2 * y + x) + at)

    def _ends(
        self, code: Code, given: Mapping[str, Value], tile: Value, block: Value, ends: Value
    ) -> None:
        """What becomes of the four outputs of a tile."""
        for corner in range(4):
            place = code.mul(code.add(code.mul(tile, 4), corner), 8)
            token = code.load(I64, given["corners"], place)
            with code.b.if_then(code.b.icmp_signed(">=", token, code.i64(0))):
                arguments = self._arguments(code, given, token, block)
                arguments[PLACES.index("x")] = code.at(ends, 64 * corner)
                code.b.call(self._corner, arguments)


def _transform(code: Code, d: list[Value]) -> list[Value]:
    """Bᵀ d"""
    b = code.b
    return [b.sub(d[0], d[2]), b.add(d[1], d[2]), b.sub(d[2], d[1]), b.sub(d[1], d[3])]


def _folded(code: Code, m: list[Value]) -> list[Value]:
    """Aᵀ m"""
    b = code.b
    return [b.add(b.add(m[0], m[1]), m[2]), b.sub(b.sub(m[1], m[2]), m[3])]
