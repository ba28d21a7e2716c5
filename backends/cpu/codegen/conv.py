"""The kernel of a convolution: the tiles of a linear layer, on patches that lie where they are.

    y[m, n] = s sx[m] Σ_t Σ_c u[n, t, c] x[place[m] + tap[t], c] + …

An output's inputs are a few runs of channels, one for each tap: which pixel, is the sum of two
numbers out of tables. Nothing is copied but where channels are few (`patches.py`); then a patch is
one pixel with one tap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import ClassVar

from llvmlite import ir

from qcompiler.backends.cpu.codegen.dots import dots
from qcompiler.backends.cpu.codegen.emit import (
    FLOAT,
    I8,
    I32,
    I64,
    Code,
    Value,
    vector,
)
from qcompiler.backends.cpu.codegen.frame import Kernel, entry, share
from qcompiler.backends.cpu.codegen.isa import Isa
from qcompiler.backends.cpu.codegen.layout import CHUNK, PLANES
from qcompiler.backends.cpu.codegen.linear import Loops
from qcompiler.backends.cpu.codegen.pixels import zero_of
from qcompiler.backends.cpu.codegen.tile import NUMBERS, POINTERS, Spec, Tile

PLACES = (*POINTERS, "places", "taps", "next", "next_sum", "next_scale", "next_zero", "targets")
"""`next…` are those of the image that codes are handed on to, `targets` its pixels."""
NUMBERS_OF = (*NUMBERS, "taps_count", "pitch", "next_pitch", "units")
"""`chunks` are those of all taps; `pitch` is bytes of a pixel, `units` those of a tap that are read
(`ends_early`)."""
SIZES = (*NUMBERS_OF, "tokens", "blocks", "strip")
"""`strip`: outputs that one thread computes at a time, a multiple of any tile's."""

ROUNDING = 1.5 * 2**23
"""Added to a number of less than 2^22, it leaves the nearest integer in the lowest bits."""


def ends_early(isa: Isa, spec: Spec) -> bool:
    """Whether a tap is read no further than there are channels, and not to the end of its last
    chunk: where sums do not mind, and zero points do not count on it."""
    plain = len(PLANES[spec.bits]) == 1 and not spec.zeros
    return plain and not dots(isa, spec.bits, spec.ready).chunked


@lru_cache(maxsize=64)
def conv(isa: Isa, spec: Spec) -> Kernel:
    """The kernel for `spec`. Frame: PLACES, SIZES, threads."""
    return Kernel(module(isa, spec), isa, len(PLACES) + len(SIZES) + 1)


def module(isa: Isa, spec: Spec) -> ir.Module:
    """Its IR."""
    made = ir.Module("conv")
    entry(made, SIZES, PLACES, Strips(made, isa, spec).write)
    return made


class Taps(Tile):
    """A tile whose tokens read a pixel for each tap."""

    pointers: ClassVar[tuple[str, ...]] = PLACES
    numbers: ClassVar[tuple[str, ...]] = NUMBERS_OF

    def _begin(self, group: Value, groups: Value) -> None:
        """What the end reads and writes is fetched now, as the sums take long enough."""
        super()._begin(group, groups)
        wanted = {"residual": self.spec.residual, "y": self.spec.floats}
        for name in (n for n, used in wanted.items() if used):
            for m in range(self.tokens):
                row = self.code.mul(self.given[f"{name}_stride"], m)
                for block in range(self.blocks):
                    self.code.prefetch(self.given[name], self.code.add(row, 64 * block))

    def _chunks(self, first: Value, count: int | Value) -> None:
        code, given = self.code, self.given
        per_tap = code.div(count, given["taps_count"])
        pixels = [code.load(I64, given["places"], 8 * m) for m in range(self.tokens)]
        starts = [code.mul(pixel, given["pitch"]) for pixel in pixels]
        with code.loop(0, given["taps_count"]) as tap:
            at = code.mul(code.load(I64, given["taps"], code.mul(tap, 8)), given["pitch"])
            before = code.mul(tap, per_tap)
            # Chunks are counted over all taps, bytes of a pixel from its own start.
            at = code.add(at, code.mul(before, -CHUNK * self.sums.step // 4))
            self._rows = [code.add(start, at) for start in starts]
            if ends_early(self.isa, self.spec):  # units lie one like the other, over all chunks
                with code.loop(0, given["units"]) as unit:
                    self._unit(before, unit)
            else:
                with code.loop(before, code.add(before, per_tap)) as chunk:
                    self._chunk(chunk)

    def _row(self, m: int) -> Value:
        return self._rows[m]

    def _finish(self) -> None:
        if self.spec.codes is not None:
            self._prepare(*self.spec.codes)
        super()._finish()
        if self.spec.codes is not None:
            for m in range(self.tokens):
                self._mark(m)

    def _prepare(self, qmin: int, qmax: int) -> None:
        """What is the same for all codes."""
        code, given, b, lanes = self.code, self.given, self.code.b, self.isa.lanes
        self._scale = code.splat(code.load(FLOAT, given["next_scale"]), lanes)
        zero = zero_of(code, given, "next_zero")
        # clamp(round(u) + z, qmin, qmax) = round(clamp(u, qmin - z, qmax - z)) + z
        ends = (b.fsub(ir.Constant(FLOAT, float(q)), zero) for q in (qmin, qmax))
        self._low, self._high = (code.splat(end, lanes) for end in ends)
        self._zero = code.splat(b.fptosi(zero, I32), lanes)
        self._targets = [code.load(I64, given["targets"], 8 * m) for m in range(self.tokens)]
        self._wrong: list[Value] = [None] * self.tokens

    def _write_out(self, m: int, offset: Value, value: Value) -> None:
        if self.spec.floats:
            super()._write_out(m, offset, value)
        if self.spec.codes is None:
            return
        code, given, b, lanes = self.code, self.given, self.code.b, self.isa.lanes
        u = b.fdiv(
            value, self._scale
        )  # not times 1 / s: codes are those of `pixels.py`, all of them
        wrong = b.fcmp_unordered("uno", u, u)
        self._wrong[m] = wrong if self._wrong[m] is None else b.or_(self._wrong[m], wrong)
        u = b.select(b.fcmp_ordered(">", u, self._low), u, self._low)
        u = b.select(b.fcmp_ordered("<", u, self._high), u, self._high)
        u = b.bitcast(b.fadd(u, code.constant(FLOAT, ROUNDING, lanes)), vector(I32, lanes))
        codes = b.trunc(b.add(u, self._zero), vector(I8, lanes))
        place = code.add(code.mul(self._targets[m], given["next_pitch"]), code.div(offset, 4))
        code.store(codes, given["next"], place)

    def _mark(self, m: int) -> None:
        """A pixel that has a NaN, which codes cannot tell of."""
        code, b = self.code, self.code.b
        bits = b.bitcast(self._wrong[m], ir.IntType(self.isa.lanes))
        found = b.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))
        with b.if_then(found, likely=False):
            mark = ir.Constant(FLOAT, math.nan)
            code.store(mark, self.given["next_sum"], code.mul(self._targets[m], 4))


class Strips(Loops):
    """Tiles over strips of outputs and groups of blocks, which threads share."""

    tile: ClassVar[type[Tile]] = Taps

    def write(self, code: Code, given: Mapping[str, Value], thread: Value, threads: Value) -> None:
        tokens, strip = given["tokens"], given["strip"]
        strips = code.div(code.add(tokens, strip, -1), strip)
        groups = code.div(given["blocks"], self._wide)
        middle = code.mul(groups, self._wide)
        left = code.add(given["blocks"], code.mul(middle, -1))
        for wide, first, count in ((self._wide, 0, groups), (1, middle, left)):
            parts = share(code, code.mul(count, strips), thread, threads)
            with code.loop(*parts) as part:
                number = code.div(part, strips)
                start = code.mul(code.add(part, code.mul(code.mul(number, strips), -1)), strip)
                stop = code.smaller(code.add(start, strip), tokens)
                block = code.add(first, code.mul(number, wide))
                self._tokens(code, given, block, wide, start, stop)

    def _places(
        self, code: Code, given: Mapping[str, Value], token: Value, block: Value
    ) -> dict[str, Value]:
        places = super()._places(code, given, token, block)
        here = dict.fromkeys(self.tile.pointers, code.i64(0)) | places
        here |= {"x": code.i64(0), "next": code.mul(block, 16)}
        return here | dict.fromkeys(("places", "targets"), code.mul(token, 8))
