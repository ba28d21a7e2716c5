"""Activations made ready for a product: int8 codes with a scale for each token, and their sums.

    q = clamp(round(x / s) + z, qmin, qmax)        s = clip max|x| / top for each token, or given

as `formats.Grid` does it, to the bit: a token of zeros has scale 1; scales stop at the smallest
normal number; a token with an infinity or NaN has that for its scale, and so has each output.
Rows are padded with zeros to whole groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from llvmlite import ir

from qcompiler.backends.cpu.codegen.before import Before, Row
from qcompiler.backends.cpu.codegen.emit import (
    FLOAT,
    I8,
    I32,
    I64,
    PTR,
    Code,
    Value,
    Variable,
    vector,
)
from qcompiler.backends.cpu.codegen.frame import Kernel, entry, share
from qcompiler.backends.cpu.codegen.isa import Isa
from qcompiler.backends.cpu.codegen.layout import CHUNK

POINTERS = ("x", "q", "scale", "total", "zero", "other", "gain", "shift", "work", "static")
"""`other` to `work` are for what stands before; `work` holds a row for each thread. `static` is the
scale that is given."""
SIZES = ("tokens", "width", "x_stride", "q_stride", "chunks", "other_stride")
"""Numbers in a row; bytes from one row to the next; chunks of 32 in a padded row."""
TINY = 1.1754943508222875e-38
"""float32's smallest normal number."""


@dataclass(frozen=True)
class Rounding:
    """How tokens are rounded."""

    group: int
    """Inputs whose sum is wanted, a multiple of 32; 0 is all of them."""
    qmin: int = -127
    qmax: int = 127
    top: float = 127.0
    clip: float = 1.0
    static: bool = False
    """Scales are given, and so may be a zero point for all tokens."""
    floating: bool = False
    """Nothing is rounded: rows are copied, with their sums."""
    before: tuple[Before, ...] = ()
    """What is done to rows first."""


@lru_cache(maxsize=256)
def rows(isa: Isa, rounding: Rounding) -> Kernel:
    """The kernel. Frame: POINTERS, SIZES, threads. `zero` and `static` are the addresses of one
    float32, or 0."""
    return Kernel(module(isa, rounding), isa, len(POINTERS) + len(SIZES) + 1)


def module(isa: Isa, rounding: Rounding) -> ir.Module:
    """Its IR."""
    made = ir.Module("rows")
    writer = _Rows(isa, rounding)
    entry(made, SIZES, POINTERS, writer.write)
    return made


class _Rows:
    def __init__(self, isa: Isa, rounding: Rounding) -> None:
        self._isa, self._how = isa, rounding
        self._kind = vector(FLOAT, isa.lanes)
        self._whole = vector(I32, isa.lanes)

    def write(self, code: Code, given: Mapping[str, Value], thread: Value, threads: Value) -> None:
        """The tokens of one thread."""
        start, end = share(code, given["tokens"], thread, threads)
        # A row's last numbers, with zeros behind them.
        tail = code.b.bitcast(code.variable(vector(FLOAT, CHUNK)).place, PTR)
        zero = self._zero(code, given)
        with code.loop(start, end) as token:
            row = code.at(given["x"], code.mul(token, given["x_stride"]))
            if self._how.before:
                row = self._made(code, given, token, row, thread)
            self._tail(code, given, row, tail)
            scale = None if self._how.floating else self._scale(code, given, token, row, tail)
            self._groups(code, given, token, row, tail, scale, zero)

    def _made(
        self,
        code: Code,
        given: Mapping[str, Value],
        token: Value,
        row: Value,
        thread: Value,
    ) -> Value:
        """The row behind what stands before the product."""
        size = code.mul(given["chunks"], 4 * CHUNK)
        work = code.at(given["work"], code.mul(thread, size))
        other = code.at(given["other"], code.mul(token, given["other_stride"]))
        Row(code, self._isa, given, row).write(self._how.before, other, work)
        return work

    def _zero(self, code: Code, given: Mapping[str, Value]) -> Value | None:
        """The zero point in each lane; None if there can be none."""
        if not self._how.static:
            return None
        b = code.b
        zero = code.variable(FLOAT)
        with b.if_then(b.icmp_unsigned("!=", b.ptrtoint(given["zero"], I64), code.i64(0))):
            zero.set(code.load(FLOAT, given["zero"]))
        return zero.get()

    def _tail(self, code: Code, given: Mapping[str, Value], row: Value, tail: Value) -> None:
        code.store(ir.Constant(vector(FLOAT, CHUNK), None), tail)
        first = code.mul(code.div(given["width"], CHUNK), CHUNK)
        with code.loop(first, given["width"]) as i:
            place = code.mul(code.add(i, code.mul(first, -1)), 4)
            code.store(code.load(FLOAT, row, code.mul(i, 4)), tail, place)

    def _source(
        self, code: Code, given: Mapping[str, Value], row: Value, tail: Value, chunk: Value
    ) -> Value:
        """Where the 32 numbers of `chunk` are: in the row, or its last ones and zeros."""
        inside = code.b.icmp_signed("<", chunk, code.div(given["width"], CHUNK))
        return code.b.select(inside, code.at(row, code.mul(chunk, 4 * CHUNK)), tail)

    def _scale(
        self, code: Code, given: Mapping[str, Value], token: Value, row: Value, tail: Value
    ) -> Value:
        place = code.mul(token, 4)
        if self._how.static:
            return code.load(FLOAT, given["static"])
        b, lanes = code.b, self._isa.lanes
        # As bits: they order positive numbers, and NaN comes out on top.
        most = code.variable(self._whole)
        with code.loop(0, code.div(code.add(given["width"], CHUNK - 1), CHUNK)) as chunk:
            source = self._source(code, given, row, tail, chunk)
            for i in range(CHUNK // lanes):
                bits = code.load(self._whole, source, i * self._isa.bytes)
                bits = b.and_(bits, code.constant(I32, 0x7FFFFFFF, lanes))
                name = f"llvm.umax.v{lanes}i32"
                most.set(code.call(name, self._whole, most.get(), bits))
        bits = code.call(f"llvm.vector.reduce.umax.v{lanes}i32", I32, most.get())
        scale = scale_of(code, self._how, b.bitcast(bits, FLOAT))
        code.store(scale, given["scale"], place)
        return scale

    def _groups(
        self,
        code: Code,
        given: Mapping[str, Value],
        token: Value,
        row: Value,
        tail: Value,
        scale: Value | None,
        zero: Value | None,
    ) -> None:
        size: int | Value = self._how.group // CHUNK or given["chunks"]
        groups = code.div(given["chunks"], size)
        out = code.at(given["q"], code.mul(token, given["q_stride"]))
        number = FLOAT if scale is None else I32
        total = code.variable(vector(number, self._isa.lanes))
        past = code.div(given["width"], CHUNK)
        if self._how.static:
            self._wrong = code.variable(self._whole)
            self._wrong.set(ir.Constant(self._whole, None))
        with code.loop(0, groups) as group:
            total.set(ir.Constant(vector(number, self._isa.lanes), None))
            first = code.mul(group, size)
            with code.loop(first, code.add(first, size)) as chunk:
                source = self._source(code, given, row, tail, chunk)
                # Chunks behind the row's last numbers are nothing but zeros.
                with code.b.if_then(code.b.icmp_signed(">", chunk, past)):
                    code.store(ir.Constant(vector(FLOAT, CHUNK), None), tail)
                self._chunk(code, source, out, chunk, scale, zero, total)
            value = code.total(total.get())
            place = code.add(code.mul(token, groups), group)
            code.store(value, given["total"], code.mul(place, 4))
        if self._how.static:
            name = f"llvm.vector.reduce.umax.v{self._isa.lanes}i32"
            wrong = code.b.icmp_unsigned(
                "!=", code.call(name, I32, self._wrong.get()), ir.Constant(I32, 0)
            )
            value = code.b.select(wrong, ir.Constant(FLOAT, math.nan), scale)
            code.store(value, given["scale"], code.mul(token, 4))

    def _chunk(
        self,
        code: Code,
        source: Value,
        out: Value,
        chunk: Value,
        scale: Value | None,
        zero: Value | None,
        total: Variable,
    ) -> None:
        b, lanes = code.b, self._isa.lanes
        for i in range(CHUNK // lanes):
            x = code.load(self._kind, source, i * self._isa.bytes)
            if scale is None:
                offset = code.add(code.mul(chunk, 4 * CHUNK), i * self._isa.bytes)
                code.store(x, out, offset)
                total.set(b.fadd(total.get(), x))
                continue
            codes = self._codes(code, x, scale, zero)
            total.set(b.add(total.get(), codes))
            offset = code.add(code.mul(chunk, CHUNK), i * lanes)
            code.store(b.trunc(codes, vector(I8, lanes)), out, offset)

    def _codes(self, code: Code, x: Value, scale: Value, zero: Value | None) -> Value:
        b, lanes = code.b, self._isa.lanes
        u = b.fdiv(x, code.splat(scale, lanes))
        if self._how.static:
            missing = b.zext(b.fcmp_unordered("uno", u, u), self._whole)
            self._wrong.set(b.or_(self._wrong.get(), missing))
        return encode(code, self._how.qmin, self._how.qmax, u, zero)


def scale_of(code: Code, how: Rounding, size: Value) -> Value:
    """The scale of numbers of at most this size."""
    b = code.b
    if how.clip != 1.0:
        size = b.fmul(size, ir.Constant(FLOAT, how.clip))
    scale = b.fdiv(size, ir.Constant(FLOAT, how.top))
    least = ir.Constant(FLOAT, TINY)
    scale = b.select(b.fcmp_ordered("<", scale, least), least, scale)
    zero = b.fcmp_ordered("==", size, ir.Constant(FLOAT, 0.0))
    return b.select(zero, ir.Constant(FLOAT, 1.0), scale)


def encode(code: Code, qmin: int, qmax: int, u: Value, zero: Value | None) -> Value:
    """int32 codes of a vector of numbers in units of their scale."""
    b, lanes = code.b, u.type.count
    u = code.call(f"llvm.rint.v{lanes}f32", u.type, u)
    u = u if zero is None else b.fadd(u, code.splat(zero, lanes))
    low = code.constant(FLOAT, float(qmin), lanes)
    high = code.constant(FLOAT, float(qmax), lanes)
    # A comparison with NaN is false: it becomes the lowest code, and its scale is NaN.
    u = b.select(b.fcmp_ordered(">", u, low), u, low)
    u = b.select(b.fcmp_ordered("<", u, high), u, high)
    return b.fptosi(u, vector(I32, lanes))
