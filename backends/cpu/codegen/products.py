"""Products of codes with activations in float32: weights decoded in registers.

    sum_k (u[n, k] - z[n]) x[m, k]        u: unsigned codes, x: float32

It has the interface of `dots.Dots`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import ClassVar

from llvmlite import ir

from qcompiler.backends.cpu.codegen.emit import FLOAT, I8, I32, Code, Value, vector
from qcompiler.backends.cpu.codegen.isa import Isa


class Products:
    """float32 sums of one tile, by its cells."""

    number: ClassVar[ir.Type] = FLOAT
    step: ClassVar[int] = 16
    chunked: ClassVar[bool] = False

    def __init__(self, code: Code, isa: Isa, bits: int, cells: list[Hashable]) -> None:
        self.code, self.isa, self.bits = code, isa, bits
        self.kind = vector(FLOAT, isa.lanes)
        self.sums = {cell: code.variable(self.kind) for cell in cells}

    def start(self, cells: Iterable[Hashable], total: Value | None, zero: int) -> None:
        """The sums of these cells begin."""
        for cell in cells:
            self.sums[cell].set(ir.Constant(self.kind, None))

    def value(self, cell: Hashable) -> Value:
        """The sums."""
        return self.sums[cell].get()

    def weights(self, codes: Value, zero: Value | None) -> list[Value]:
        """The codes of each of four inputs as numbers, less their zero: subtracted from the numbers
        and not from the sums, so that a weight of zeros gives zero."""
        b, lanes = self.code.b, self.isa.lanes
        if zero is None:  # that of all, from four at once
            bytes_ = vector(I8, self.isa.bytes)
            middle = self.code.constant(
                I8, -128 if self.bits == 8 else 1 << (self.bits - 1), 4 * lanes
            )
            codes = b.bitcast(b.sub(b.bitcast(codes, bytes_), middle), codes.type)
        return [self._number(codes, byte, zero) for byte in range(4)]

    def _number(self, codes: Value, byte: int, zero: Value | None) -> Value:
        b, lanes = self.code.b, self.isa.lanes
        if zero is None:
            left = (
                b.shl(codes, self.code.constant(I32, 24 - 8 * byte, lanes)) if byte < 3 else codes
            )
            return b.sitofp(b.ashr(left, self.code.constant(I32, 24, lanes)), self.kind)
        one = b.lshr(codes, self.code.constant(I32, 8 * byte, lanes)) if byte else codes
        one = b.and_(one, self.code.constant(I32, 255, lanes))
        return b.fsub(b.sitofp(one, self.kind), zero)

    def inputs(self, x: Value, offset: Value) -> list[Value]:
        """Four inputs, each the same in each lane."""
        code = self.code
        return [
            code.splat(code.load(FLOAT, x, code.add(offset, 4 * i)), self.isa.lanes)
            for i in range(4)
        ]

    def open(self) -> None:
        """A chunk begins."""

    def add(self, cell: Hashable, codes: list[Value], x: list[Value]) -> None:
        """Four inputs: what `weights` and `inputs` made."""
        sum_ = self.sums[cell]
        for number, value in zip(codes, x, strict=True):
            sum_.set(self.code.fma(number, value, sum_.get()))

    def close(self) -> None:
        """The chunk ends."""
