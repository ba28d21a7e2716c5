"""Products of codes with activations in float32: weights decoded in registers.

    sum_k u[n, k] x[m, k]        u: unsigned codes, x: float32

It has the interface of `dots.Dots`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import ClassVar

from llvmlite import ir

from qcompiler.backends.cpu.codegen.emit import FLOAT, I32, Code, Value, vector
from qcompiler.backends.cpu.codegen.isa import Isa


class Products:
    """float32 sums of one tile, by its cells."""

    number: ClassVar[ir.Type] = FLOAT
    step: ClassVar[int] = 16

    def __init__(self, code: Code, isa: Isa, bits: int, cells: list[Hashable]) -> None:
        self.code, self.isa = code, isa
        self.kind = vector(FLOAT, isa.lanes)
        self.sums = {cell: code.variable(self.kind) for cell in cells}

    def start(self, cells: Iterable[Hashable], total: Value | None, zero: int) -> None:
        """The sums of these cells begin, at - zero · total where all inputs sum up to `total`."""
        value = ir.Constant(self.kind, None)
        if total is not None and zero:
            less = self.code.b.fmul(total, ir.Constant(FLOAT, -zero))
            value = self.code.splat(less, self.isa.lanes)
        for cell in cells:
            self.sums[cell].set(value)

    def value(self, cell: Hashable) -> Value:
        """The sums."""
        return self.sums[cell].get()

    def weights(self, codes: Value) -> list[Value]:
        """The codes of each of four inputs as numbers."""
        b, lanes = self.code.b, self.isa.lanes
        numbers = []
        for byte in range(4):
            one = b.lshr(codes, self.code.constant(I32, 8 * byte, lanes)) if byte else codes
            if byte < 3:
                one = b.and_(one, self.code.constant(I32, 255, lanes))
            numbers.append(b.sitofp(one, self.kind))
        return numbers

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
