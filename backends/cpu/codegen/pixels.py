"""An image made ready for a convolution: int8 codes, channel by channel, with their padding.

    q[n, h, w, c] = clamp(round(x[n, h, w, c] / s) + z, qmin, qmax)        z around it

s is given, or one number for each image (or for all of them) that covers it, as in `rows.py`. The
sum of each pixel's codes goes with them, in float32, which is exact below 2^24. A scale that is
given cannot tell of a NaN: then the sum is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

from llvmlite import ir

from qcompiler.backends.cpu.codegen.emit import FLOAT, I8, I32, I64, Code, Value, vector
from qcompiler.backends.cpu.codegen.frame import Kernel, share
from qcompiler.backends.cpu.codegen.isa import Isa
from qcompiler.backends.cpu.codegen.rows import Rounding, encode, scale_of

LARGEST_POINTERS = ("x", "most")
LARGEST_SIZES = ("lines", "width")
"""Lines of as many numbers; `most` has one for each."""
SCALES_POINTERS = ("most", "scale")
SCALES_SIZES = ("count", "alike")
"""Scales; lines that share one."""
POINTERS = ("x", "q", "sum", "scale", "zero")
"""`zero` is one float32, or 0."""
SIZES = ("images", "height", "width", "channels", "top", "left", "full_height", "full_width",
         "pitch", "alike")  # fmt: skip
"""`top` and `left` are the padding, `full_…` sizes with it; `pitch` is bytes of a pixel's codes,
`alike` lines of x that share a scale."""


@lru_cache(maxsize=16)
def largest(isa: Isa) -> Kernel:
    """max |x| of each line, NaN where there is one. Frame: LARGEST_POINTERS, LARGEST_SIZES,
    threads."""
    return Kernel.of("largest", isa, LARGEST_SIZES, LARGEST_POINTERS, _Largest(isa).write)


@lru_cache(maxsize=16)
def scales(isa: Isa, rounding: Rounding) -> Kernel:
    """The scales of lines by their largest numbers. Frame: SCALES_POINTERS, SCALES_SIZES,
    threads."""
    return Kernel.of("scales", isa, SCALES_SIZES, SCALES_POINTERS, _Scales(rounding).write)


@lru_cache(maxsize=64)
def pixels(isa: Isa, rounding: Rounding, summed: bool) -> Kernel:
    """The kernel; x (images, height, width, channels) float32 lies in this order. Unless `summed`,
    sums are only marks of NaN, and else 0. Frame: POINTERS, SIZES, threads."""
    return Kernel.of("pixels", isa, SIZES, POINTERS, _Pixels(isa, rounding, summed).write)


@lru_cache(maxsize=16)
def borders(isa: Isa, summed: bool) -> Kernel:
    """The padding and the sums of pixels whose first `channels` codes are there already; the same
    frame."""
    made = _Borders(isa, Rounding(0, static=True), summed)
    return Kernel.of("borders", isa, SIZES, POINTERS, made.write)


class _Largest:
    def __init__(self, isa: Isa) -> None:
        self._isa = isa

    def write(self, code: Code, given: Mapping[str, Value], thread: Value, threads: Value) -> None:
        """The lines of one thread."""
        width, lanes = given["width"], self._isa.lanes
        kinds = {n: vector(I32, n) for n in (lanes, 1)}
        most = {n: code.variable(kind) for n, kind in kinds.items()}
        whole = code.mul(code.div(width, lanes), lanes)
        with code.loop(*share(code, given["lines"], thread, threads)) as line:
            row = code.at(given["x"], code.mul(line, code.mul(width, 4)))
            for n, (start, stop) in {lanes: (code.i64(0), whole), 1: (whole, width)}.items():
                most[n].set(ir.Constant(kinds[n], None))
                with code.loop(start, stop, n) as i:
                    bits = code.load(kinds[n], row, code.mul(i, 4))
                    bits = code.b.and_(bits, code.constant(I32, 0x7FFFFFFF, n))
                    most[n].set(larger(code, most[n].get(), bits))
            found = [
                code.call(f"llvm.vector.reduce.umax.v{n}i32", I32, most[n].get())
                for n in (lanes, 1)
            ]
            code.store(larger(code, *found), given["most"], code.mul(line, 4))


class _Scales:
    def __init__(self, rounding: Rounding) -> None:
        self._how = rounding

    def write(self, code: Code, given: Mapping[str, Value], thread: Value, threads: Value) -> None:
        """The scales of one thread."""
        alike = given["alike"]
        most = code.variable(I32)
        with code.loop(*share(code, given["count"], thread, threads)) as number:
            most.set(ir.Constant(I32, 0))
            first = code.mul(number, alike)
            with code.loop(first, code.add(first, alike)) as line:
                bits = code.load(I32, given["most"], code.mul(line, 4))
                most.set(larger(code, most.get(), bits))
            scale = scale_of(code, self._how, code.b.bitcast(most.get(), FLOAT))
            code.store(scale, given["scale"], code.mul(number, 4))


def larger(code: Code, a: Value, b: Value) -> Value:
    """max(a, b) of numbers without their sign, as bits: they order positive numbers, and NaN comes
    out on top."""
    return code.b.select(code.b.icmp_unsigned(">", a, b), a, b)


def zero_of(code: Code, given: Mapping[str, Value], name: str = "zero") -> Value:
    """The zero point at an address that may be 0, which is 0."""
    zero = code.variable(FLOAT)
    address = code.b.ptrtoint(given[name], I64)
    with code.b.if_then(code.b.icmp_unsigned("!=", address, code.i64(0))):
        zero.set(code.load(FLOAT, given[name]))
    return zero.get()


class _Pixels:
    def __init__(self, isa: Isa, rounding: Rounding, summed: bool) -> None:
        self._isa, self._how, self._summed = isa, rounding, summed

    def write(self, code: Code, given: Mapping[str, Value], thread: Value, threads: Value) -> None:
        """The lines of one thread, padding and all."""
        lines = code.mul(given["images"], given["full_height"])
        zero = zero_of(code, given)
        with code.loop(*share(code, lines, thread, threads)) as line:
            image = code.div(line, given["full_height"])
            rest = code.add(line, code.mul(code.mul(image, given["full_height"]), -1))
            y = code.add(rest, code.mul(given["top"], -1))
            first = code.mul(line, given["full_width"])
            # As unsigned numbers, those below 0 are large.
            inside = code.b.icmp_unsigned("<", y, given["height"])
            source = code.add(code.mul(image, given["height"]), y)
            self._whole(code, given, inside, source, first, zero)
            if self._summed:
                self._sums(code, given, first)

    def _whole(
        self,
        code: Code,
        given: Mapping[str, Value],
        inside: Value,
        source: Value,
        first: Value,
        zero: Value,
    ) -> None:
        """A line with its padding; `first` is its first pixel, `source` the line of x."""
        self._clear(code, given, first, code.add(first, given["full_width"]), zero)
        with code.b.if_then(inside):
            self._line(code, given, source, first, zero)

    def _clear(
        self, code: Code, given: Mapping[str, Value], start: Value, stop: Value, zero: Value
    ) -> None:
        """Nothing but padding, from one pixel to another."""
        pitch = given["pitch"]
        self._fill(code, given, code.mul(start, pitch), code.mul(stop, pitch), zero)
        with code.loop(start, stop) as pixel:
            code.store(ir.Constant(FLOAT, 0.0), given["sum"], code.mul(pixel, 4))

    def _fill(
        self, code: Code, given: Mapping[str, Value], start: Value, stop: Value, zero: Value
    ) -> None:
        value = code.b.fptosi(zero, I8)
        with code.loop(start, stop) as i:
            code.store(value, given["q"], i)

    def _line(
        self, code: Code, given: Mapping[str, Value], source: Value, first: Value, zero: Value
    ) -> None:
        """One line of x, which is one run of numbers, or one for each pixel."""
        width, channels, pitch = (given[name] for name in ("width", "channels", "pitch"))
        whole = code.b.icmp_signed("==", channels, pitch)
        runs = code.b.select(whole, code.i64(1), width)
        run = code.b.select(whole, code.mul(width, channels), channels)
        row = code.at(given["x"], code.mul(source, code.mul(4, code.mul(width, channels))))
        start = code.add(first, given["left"])
        number = code.div(source, given["alike"])
        scale = code.load(FLOAT, given["scale"], code.mul(number, 4))
        missing = code.variable(I32)
        missing.set(ir.Constant(I32, 0))
        with code.loop(0, runs) as i:
            x = code.at(row, code.mul(4, code.mul(i, run)))
            q = code.at(given["q"], code.mul(code.add(start, i), pitch))
            self._run(code, x, q, run, scale, zero, missing)
        if self._how.static:
            wrong = code.b.icmp_unsigned("!=", missing.get(), ir.Constant(I32, 0))
            with code.b.if_then(wrong, likely=False):
                self._mark(code, given, row, start)

    def _run(
        self, code: Code, x: Value, q: Value, run: Value, scale: Value, zero: Value, missing: Value
    ) -> None:
        b, lanes = code.b, self._isa.lanes
        whole = code.mul(code.div(run, lanes), lanes)
        for n, start, stop in ((lanes, code.i64(0), whole), (1, whole, run)):
            kind = vector(I32, n)
            marks = code.variable(kind)
            marks.set(ir.Constant(kind, None))
            with code.loop(start, stop, n) as i:
                u = code.load(vector(FLOAT, n), x, code.mul(i, 4))
                u = b.fdiv(u, code.splat(scale, n))
                if self._how.static:
                    marks.set(b.or_(marks.get(), b.zext(b.fcmp_unordered("uno", u, u), kind)))
                codes = encode(code, self._how.qmin, self._how.qmax, u, zero)
                code.store(b.trunc(codes, vector(I8, n)), q, i)
            if self._how.static:
                found = code.call(f"llvm.vector.reduce.or.v{n}i32", I32, marks.get())
                missing.set(b.or_(missing.get(), found))

    def _mark(self, code: Code, given: Mapping[str, Value], row: Value, start: Value) -> None:
        """NaN for each pixel of a line that has one."""
        channels = given["channels"]
        with code.loop(0, given["width"]) as pixel:
            first = code.mul(pixel, channels)
            with code.loop(first, code.add(first, channels)) as i:
                x = code.load(FLOAT, row, code.mul(i, 4))
                with code.b.if_then(code.b.fcmp_unordered("uno", x, x)):
                    place = code.mul(code.add(start, pixel), 4)
                    code.store(ir.Constant(FLOAT, math.nan), given["sum"], place)

    def _sums(self, code: Code, given: Mapping[str, Value], first: Value) -> None:
        b, pitch, lanes = code.b, given["pitch"], self._isa.lanes
        whole = code.mul(code.div(pitch, lanes), lanes)
        kind = vector(I32, lanes)
        wide, rest = code.variable(kind), code.variable(I32)
        with code.loop(first, code.add(first, given["full_width"])) as pixel:
            q = code.at(given["q"], code.mul(pixel, pitch))
            wide.set(ir.Constant(kind, None))
            with code.loop(0, whole, lanes) as i:
                wide.set(b.add(wide.get(), b.sext(code.load(vector(I8, lanes), q, i), kind)))
            rest.set(code.total(wide.get()))
            with code.loop(whole, pitch) as i:
                rest.set(b.add(rest.get(), b.sext(code.load(I8, q, i), I32)))
            place = code.mul(pixel, 4)
            mark = code.load(FLOAT, given["sum"], place)
            code.store(b.fadd(b.sitofp(rest.get(), FLOAT), mark), given["sum"], place)


class _Borders(_Pixels):
    def _whole(
        self,
        code: Code,
        given: Mapping[str, Value],
        inside: Value,
        source: Value,
        first: Value,
        zero: Value,
    ) -> None:
        last = code.add(first, given["full_width"])
        start = code.add(first, given["left"])
        stop = code.add(start, given["width"])
        with code.b.if_else(inside) as (within, without):
            with within:
                self._clear(code, given, first, start, zero)
                with code.loop(start, stop) as pixel:
                    place = code.mul(pixel, given["pitch"])
                    self._fill(
                        code,
                        given,
                        code.add(place, given["channels"]),
                        code.add(place, given["pitch"]),
                        zero,
                    )
                self._clear(code, given, stop, last, zero)
            with without:
                self._clear(code, given, first, last, zero)
