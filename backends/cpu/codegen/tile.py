"""One tile of a product: a few tokens by a few blocks of 16 outputs, over all inputs.

    y[m, n] = sx[m] Σ_g s[n, g] (Σ_{k in g} u[n, k] x[m, k] - z[n, g] Σ_{k in g} x[m, k]) + b[n]

with unsigned codes u, a scale s and a zero point z for each group g of inputs. Symmetric formats
have the same z for all, which is where the sums begin; other zero points come as products s z.
Inputs with a zero point of their own, x - z', add - z' Σ (u - z) to where the sums begin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from llvmlite import ir

from qcompiler.backends.cpu.codegen.dots import Dots, dots
from qcompiler.backends.cpu.codegen.emit import (
    FLOAT,
    HALF,
    I16,
    I32,
    I64,
    PTR,
    Code,
    Value,
    Variable,
    function,
    vector,
)
from qcompiler.backends.cpu.codegen.functions import FUNCTIONS
from qcompiler.backends.cpu.codegen.isa import Isa
from qcompiler.backends.cpu.codegen.layout import CHUNK, PLANES, STEPS
from qcompiler.backends.cpu.codegen.products import Products

POINTERS = (
    "y",
    "x",
    "total",
    "x_scale",
    "weight",
    "scale",
    "zero",
    "bias",
    "residual",
    "start",
    "x_zero",
)
"""What a tile is given by address; `total` are the sums of inputs by token and group, `start` where
sums begin by output and group."""
NUMBERS = ("chunks", "x_stride", "y_stride", "residual_stride")
"""… and by value: chunks of 32 inputs; bytes from one token to the next."""


@dataclass(frozen=True)
class Spec:
    """What a kernel is made for."""

    bits: int
    group: int
    """Inputs that share a scale, a multiple of 32; 0 is all of them."""
    half: bool = False
    """Scales are stored in 16 bits."""
    zeros: bool = False
    """Each group has a zero point, float32: as the product s z, or z for floating activations."""
    floating: bool = False
    """Activations are float32, not int8."""
    ready: bool = False
    """int8 activations come as int16: see `widen.py`."""
    shifted: bool = False
    """int8 activations have a zero point, one for all."""
    residual: bool = False
    """Something of the shape of y is added to it."""
    behind: str = ""
    """One of `functions.py`, at the end."""
    codes: tuple[int, int] | None = None
    """The result is handed on as codes in this range; see `conv.py`."""
    floats: bool = True
    """It is written as it is."""

    @property
    def unit(self) -> int:
        """Steps of four inputs whose codes lie in the same vectors."""
        return 8 // min(PLANES[self.bits])

    @property
    def side(self) -> ir.Type:
        """Type of a stored scale."""
        return HALF if self.half else FLOAT

    @property
    def side_bytes(self) -> int:
        """Bytes of the scales of one group of a block."""
        return 32 if self.half else 64


Cell = tuple[int, int, int]
"""Token, block, vector in the block."""


class Tile:
    """Writes the function that computes one tile."""

    pointers: ClassVar[tuple[str, ...]] = POINTERS
    numbers: ClassVar[tuple[str, ...]] = NUMBERS

    def __init__(self, module: ir.Module, isa: Isa, spec: Spec, tokens: int, blocks: int) -> None:
        self.isa, self.spec, self.tokens, self.blocks = isa, spec, tokens, blocks
        kinds = [PTR] * len(self.pointers) + [I64] * len(self.numbers)
        name = f"tile_{tokens}x{blocks}"
        self.function = function(module, name, kinds, inline=True)
        self.given = dict(zip((*self.pointers, *self.numbers), self.function.args, strict=True))
        self.code = Code(self.function)
        self.vectors = 64 // isa.bytes
        self.cells = [(m, *place) for m in range(tokens) for place in self._places]
        self.sums = self._products(isa, spec)(self.code, isa, spec.bits, list(self.cells))
        self.floats = {cell: self._float() for cell in self.cells}
        self._write()

    def _products(self, isa: Isa, spec: Spec) -> type[Dots] | type[Products]:
        """How products are taken."""
        return Products if spec.floating else dots(isa, spec.bits, spec.ready)

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        return [(n, v) for n in range(self.blocks) for v in range(self.vectors)]

    def _float(self) -> Variable:
        return self.code.variable(vector(FLOAT, self.isa.lanes))

    def _write(self) -> None:
        code, chunks = self.code, self.given["chunks"]
        size: int | Value = self.spec.group // CHUNK or chunks
        groups = code.div(chunks, size)
        with code.loop(0, groups) as group:
            self._begin(group, groups)
            self._chunks(code.mul(group, size), size)
            self._fold(group, groups)
        self._finish()
        code.b.ret_void()

    def _chunks(self, first: Value, count: int | Value) -> None:
        """The inputs of a group."""
        with self.code.loop(first, self.code.add(first, count)) as chunk:
            self._chunk(chunk)

    def _row(self, m: int) -> Value:
        """Bytes from `x` to the inputs of a token."""
        return self.code.mul(self.given["x_stride"], m)

    def _begin(self, group: Value, groups: Value) -> None:
        zero = 0 if self.spec.zeros else 1 << (self.spec.bits - 1)
        for m in range(self.tokens):
            cells = [(m, *place) for place in self._places]
            self.sums.start(cells, self._total(m, group, groups), zero)
        self._zeros = dict.fromkeys(self._places)
        for place in self._places:
            if self.spec.shifted:
                start = self._side("start", I32, place, group, groups)
                for m in range(self.tokens):
                    cell = self.sums.sums[m, *place]
                    cell.set(self.code.b.add(cell.get(), start))
            if self.spec.zeros and self.spec.floating:
                self._zeros[place] = self._side("zero", FLOAT, place, group, groups)

    def _side(
        self, name: str, kind: ir.Type, place: tuple[int, int], group: Value, groups: Value
    ) -> Value:
        """32-bit numbers of a group, one for each output of a vector."""
        n, v = place
        row = self.code.add(self.code.mul(groups, n), group)
        offset = self.code.add(self.code.mul(row, 64), v * self.isa.bytes)
        return self.code.load(vector(kind, self.isa.lanes), self.given[name], offset)

    def _total(self, m: int, group: Value, groups: Value) -> Value:
        place = self.code.add(group, self.code.mul(groups, m))
        return self.code.load(self.sums.number, self.given["total"], self.code.mul(place, 4))

    def _chunk(self, chunk: Value) -> None:
        self.sums.open()
        unit = self.spec.unit
        # A loop and not a list of instructions: LLVM would reorder them and run out of registers.
        with self.code.loop(0, STEPS // unit) as number:
            self._unit(chunk, number)
        self.sums.close()

    def _unit(self, chunk: Value, number: Value) -> None:
        code, unit = self.code, self.spec.unit
        steps = code.add(code.mul(chunk, STEPS), code.mul(number, unit))
        at = code.mul(steps, self.sums.step)
        codes = self._codes(chunk, number)
        for step in range(unit):
            weights = {p: self.sums.weights(codes(step, *p), self._zeros[p]) for p in self._places}
            for m in range(self.tokens):
                offset = code.add(at, self._row(m), step * self.sums.step)
                x = self.sums.inputs(self.given["x"], offset)
                for place in self._places:
                    self.sums.add((m, *place), weights[place], x)

    def _codes(self, chunk: Value, number: Value) -> Callable[[int, int, int], Value]:
        """(step in the unit, block, vector) → codes of 4 inputs in the 4 bytes of each lane."""
        code, b = self.code, self.code.b
        bits, lanes = self.spec.bits, self.isa.lanes
        base = code.mul(chunk, 64 * bits)
        block = code.mul(self.given["chunks"], 64 * bits)
        loaded: dict[tuple[int, int, int], Value] = {}

        def plane(start: int, width: int, step: int, n: int, v: int) -> Value:
            """Vectors of a plane of `width` bits begin 64 · `start` bytes into the chunk."""
            index, shift = divmod(step, 8 // width)
            key = (start + index, n, v)
            if key not in loaded:
                rest = code.mul(number, 64 * (self.spec.unit * width // 8))
                offset = code.add(base, code.mul(block, n), rest, 64 * key[0] + v * self.isa.bytes)
                loaded[key] = code.load(vector(I32, lanes), self.given["weight"], offset)
                if self.tokens == 1 and v == 0:
                    code.prefetch(
                        self.given["weight"], code.add(offset, code.mul(block, self.blocks))
                    )
            value = loaded[key]
            if width == 8:
                return value
            if shift:
                value = b.lshr(value, code.constant(I32, shift * width, lanes))
            return b.and_(value, code.constant(I32, ((1 << width) - 1) * 0x01010101, lanes))

        def codes(step: int, n: int, v: int) -> Value:
            total, start = None, 0
            for width in PLANES[bits]:
                part = plane(start, width, step, n, v)
                if total is not None:
                    part = b.or_(total, b.shl(part, code.constant(I32, start, lanes)))
                total, start = part, start + width
            return total

        return codes

    def _fold(self, group: Value, groups: Value) -> None:
        """y += s · sums - s z · total"""
        code, spec = self.code, self.spec
        for n, v in self._places:
            place = code.add(code.mul(groups, n), group)
            offset = code.add(code.mul(place, spec.side_bytes), v * spec.side_bytes // self.vectors)
            scale = code.load(vector(spec.side, self.isa.lanes), self.given["scale"], offset)
            if self.tokens == 1 and v == 0:
                ahead = code.mul(code.mul(groups, spec.side_bytes), self.blocks)
                code.prefetch(self.given["scale"], code.add(offset, ahead))
            if spec.half:
                scale = _widened(code, scale, self.isa)
            zero = None
            if spec.zeros and not spec.floating:
                zero = code.b.fneg(self._side("zero", FLOAT, (n, v), group, groups))
            for m in range(self.tokens):
                cell = self.floats[m, n, v]
                cell.set(code.fma(self.sums.value((m, n, v)), scale, cell.get()))
                if zero is not None:
                    total = code.b.sitofp(self._centred(m, group, groups), FLOAT)
                    cell.set(code.fma(code.splat(total, self.isa.lanes), zero, cell.get()))

    def _centred(self, m: int, group: Value, groups: Value) -> Value:
        """Σ (x - z') over the group."""
        code, total = self.code, self._total(m, group, groups)
        if not self.spec.shifted:
            return total
        size = code.b.udiv(code.mul(self.given["chunks"], CHUNK), groups)
        point = code.b.fptosi(code.load(FLOAT, self.given["x_zero"]), I32)
        return code.b.sub(total, code.b.mul(point, code.b.trunc(size, I32)))

    def _finish(self) -> None:
        """y = behind(y · sx + b + residual)"""
        code, lanes = self.code, self.isa.lanes
        for m in range(self.tokens):
            if not self.spec.floating:
                factor = code.splat(code.load(FLOAT, self.given["x_scale"], 4 * m), lanes)
            for n, v in self._places:
                offset = 64 * n + v * self.isa.bytes
                value = self.floats[m, n, v].get()
                bias = code.load(vector(FLOAT, lanes), self.given["bias"], offset)
                if self.spec.floating:
                    value = code.b.fadd(value, bias)
                else:
                    value = code.fma(value, factor, bias)
                if self.spec.residual:
                    place = code.add(code.mul(self.given["residual_stride"], m), offset)
                    more = code.load(vector(FLOAT, lanes), self.given["residual"], place)
                    value = code.b.fadd(value, more)
                if self.spec.behind:
                    value = FUNCTIONS[self.spec.behind](code, value)
                self._write_out(m, offset, value)

    def _write_out(self, m: int, offset: Value, value: Value) -> None:
        """`value` is what is `offset` bytes into the outputs of a token."""
        place = self.code.add(self.code.mul(self.given["y_stride"], m), offset)
        self.code.store(value, self.given["y"], place)


def _widened(code: Code, half: Value, isa: Isa) -> Value:
    """float16 to float32. Where there is no instruction LLVM would call a function for each: there
    it is the bits, moved to their place, times 2^112."""
    b, lanes = code.b, isa.lanes
    kind = vector(FLOAT, lanes)
    if {"f16c", "neon"} & set(isa.features):
        return b.fpext(half, kind)
    bits = b.zext(b.bitcast(half, vector(I16, lanes)), vector(I32, lanes))
    size = b.shl(b.and_(bits, code.constant(I32, 0x7FFF, lanes)), code.constant(I32, 13, lanes))
    sign = b.shl(b.and_(bits, code.constant(I32, 0x8000, lanes)), code.constant(I32, 16, lanes))
    value = b.bitcast(b.or_(size, sign), kind)
    return b.fmul(value, code.constant(FLOAT, 2.0**112, lanes))
