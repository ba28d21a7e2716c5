"""Products of codes with quantized activations, four inputs at a time, exact in integers.

    sum_k u[n, k] x[m, k]        u: unsigned codes, x: int8, for the outputs n of a block

Each class is one way to do it, by the instructions there are. What is summed in 16 bits stays in
range by construction: u < 2^b, |x| <= 128, so that 2 · 2^b · 128 · steps < 2^15. In 32 bits there
is room for 2^31 / (255 · 128) = 65,793 inputs of 8 bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from typing import Any, ClassVar

from llvmlite import ir

from qcompiler.backends.cpu.codegen.emit import FLOAT, I8, I16, I32, Code, Value, Variable, vector
from qcompiler.backends.cpu.codegen.isa import Isa
from qcompiler.backends.cpu.codegen.layout import STEPS

MADD = "llvm.x86.avx2.pmadd.wd"


class Dots(ABC):
    """32-bit sums of one tile, by its cells."""

    signed8: ClassVar[bool] = False
    """Whether codes of 8 bits are made signed, so that 128 less is the code of any number."""
    number: ClassVar[ir.Type] = I32
    """Type of the sums of x."""
    step: ClassVar[int] = 4
    """Bytes of four inputs."""
    chunked: ClassVar[bool] = False
    """Whether sums want to be told where a chunk begins and ends (`open`, `close`)."""

    def __init__(self, code: Code, isa: Isa, bits: int, cells: list[Hashable]) -> None:
        self.code, self.isa, self.bits = code, isa, bits
        self.kind = vector(I32, isa.lanes)
        self.sums = {cell: code.variable(self.kind) for cell in cells}
        self.moved = 128 if self.signed8 and bits == 8 else 0

    def start(self, cells: Iterable[Hashable], total: Value, zero: int) -> None:
        """The sums of these cells begin, at - zero · total where all inputs sum up to `total`."""
        value = ir.Constant(self.kind, None)
        if zero != self.moved:
            less = self.code.b.mul(total, ir.Constant(I32, self.moved - zero))
            value = self.code.splat(less, self.isa.lanes)
        for cell in cells:
            self.sums[cell].set(value)

    def value(self, cell: Hashable) -> Value:
        """The sums in float32."""
        return self.code.b.sitofp(self.sums[cell].get(), vector(FLOAT, self.isa.lanes))

    def weights(self, codes: Value, zero: Value | None) -> Any:
        """A vector of codes made ready for many `add`s; `zero` is seen to elsewhere."""
        if self.moved:
            return self.code.b.xor(codes, self.code.constant(I32, -0x7F7F7F80, self.isa.lanes))
        return codes

    def inputs(self, x: Value, offset: Value) -> Any:
        """Four inputs, the same in each lane."""
        return self.code.splat(self.code.load(I32, x, offset), self.isa.lanes)

    def open(self) -> None:
        """A chunk begins."""
        return

    @abstractmethod
    def add(self, cell: Hashable, codes: Any, x: Any) -> None:
        """Four inputs: what `weights` and `inputs` made."""

    def close(self) -> None:
        """The chunk ends."""
        return

    def more(self, cell: Hashable, value: Value) -> None:
        """sum += value"""
        sum_ = self.sums[cell]
        sum_.set(self.code.b.add(sum_.get(), value))


class QuadDots(Dots):
    """u8 × s8, four products to a lane in one instruction (VNNI)."""

    def add(self, cell: Hashable, codes: Value, x: Value) -> None:
        sum_ = self.sums[cell]
        name = f"llvm.x86.avx512.vpdpbusd.{self.isa.bits}"
        sum_.set(self.code.call(name, self.kind, sum_.get(), codes, x))


class SignedQuadDots(Dots):
    """s8 × s8, four products to a lane in one instruction (Arm's sdot)."""

    signed8: ClassVar[bool] = True

    def add(self, cell: Hashable, codes: Value, x: Value) -> None:
        sum_, bytes_ = self.sums[cell], vector(I8, self.isa.bytes)
        a, b = (self.code.b.bitcast(v, bytes_) for v in (codes, x))
        name = f"llvm.aarch64.neon.sdot.v{self.isa.lanes}i32.v{self.isa.bytes}i8"
        sum_.set(self.code.call(name, self.kind, sum_.get(), a, b))


class PairDots(Dots):
    """u8 × s8, two products to 16 bits (AVX2), widened when the sums could leave them. For codes of
    up to 7 bits, whose pairs fit."""

    chunked: ClassVar[bool] = True

    def __init__(self, code: Code, isa: Isa, bits: int, cells: list[Hashable]) -> None:
        super().__init__(code, isa, bits, cells)
        self.short = vector(I16, isa.bytes // 2)
        most = ((1 << bits) - 1) * 128 * 2
        self.limit = min(STEPS, (2**15 - 1) // most)
        self.partial = {cell: code.variable(self.short) for cell in cells}
        self.count: dict[Hashable, int] = {}

    def open(self) -> None:
        self.count = dict.fromkeys(self.sums, 0)
        if self.limit == STEPS:
            for partial in self.partial.values():
                partial.set(ir.Constant(self.short, None))

    def add(self, cell: Hashable, codes: Value, x: Value) -> None:
        b = self.code.b
        bytes_ = vector(I8, self.isa.bytes)
        w, x = b.bitcast(codes, bytes_), b.bitcast(x, bytes_)
        pairs = self.code.call("llvm.x86.avx2.pmadd.ub.sw", self.short, w, x)
        partial = self.partial[cell]
        fresh = self.limit < STEPS and self.count[cell] % self.limit == 0
        partial.set(pairs if fresh else b.add(partial.get(), pairs))
        self.count[cell] += 1
        if self.limit < STEPS and self.count[cell] % self.limit == 0:
            self._widen(cell, partial)

    def close(self) -> None:
        if self.limit == STEPS:
            for cell, partial in self.partial.items():
                self._widen(cell, partial)

    def _widen(self, cell: Hashable, partial: Variable) -> None:
        ones = self.code.constant(I16, 1, self.isa.bytes // 2)
        self.more(cell, self.code.call(MADD, self.kind, partial.get(), ones))


class WideDots(Dots):
    """u8 × s8 in 16 bits, two products to 32 (AVX2), for codes of 8 bits: even and odd bytes
    apart."""

    def weights(self, codes: Value, zero: Value | None) -> tuple[Value, Value]:
        b, short = self.code.b, self._short(codes)
        low = b.and_(short, self.code.constant(I16, 255, self.isa.bytes // 2))
        return low, b.lshr(short, self.code.constant(I16, 8, self.isa.bytes // 2))

    def inputs(self, x: Value, offset: Value) -> tuple[Value, Value]:
        b, short = self.code.b, self._short(super().inputs(x, offset))
        eight = self.code.constant(I16, 8, self.isa.bytes // 2)
        return b.ashr(b.shl(short, eight), eight), b.ashr(short, eight)

    def add(self, cell: Hashable, codes: tuple[Value, Value], x: tuple[Value, Value]) -> None:
        for a, b in zip(codes, x, strict=True):
            self.more(cell, self.code.call(MADD, self.kind, a, b))

    def _short(self, value: Value) -> Value:
        return self.code.b.bitcast(value, vector(I16, self.isa.bytes // 2))


class ReadyDots(WideDots):
    """The same with inputs that come as int16 (`widen.py`)."""

    step: ClassVar[int] = 8

    def inputs(self, x: Value, offset: Value) -> tuple[Value, Value]:
        even, odd = (Dots.inputs(self, x, self.code.add(offset, n)) for n in (0, 4))
        return self._short(even), self._short(odd)


class PlainDots(Dots):
    """One product after the other, in 32 bits: for any CPU."""

    def add(self, cell: Hashable, codes: Value, x: Value) -> None:
        b, lanes = self.code.b, self.isa.lanes
        for byte in range(4):
            shift = self.code.constant(I32, 8 * byte, lanes)
            w = b.and_(b.lshr(codes, shift), self.code.constant(I32, 255, lanes))
            left = self.code.constant(I32, 24 - 8 * byte, lanes)
            value = b.ashr(b.shl(x, left), self.code.constant(I32, 24, lanes))
            self.more(cell, b.mul(w, value))


def in_16_bits(isa: Isa, bits: int) -> bool:
    """Whether products of codes of `bits` are taken in 16 bits, so that inputs may come as such."""
    return isa.name == "avx2" and bits == 8


def dots(isa: Isa, bits: int, ready: bool = False) -> type[Dots]:
    """How products of codes of `bits` are taken; `ready`: inputs come as int16."""
    if in_16_bits(isa, bits):
        return ReadyDots if ready else WideDots
    if isa.name == "avx2":
        return PairDots
    return {"vnni": QuadDots, "neon": SignedQuadDots}.get(isa.name, PlainDots)
