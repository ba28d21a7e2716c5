"""`Code`: LLVM IR written down with loops, vectors and memory at byte offsets.

Variables are stack slots: LLVM's first pass makes registers of them, so that no generator has to
join what comes from different blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()
PTR = ir.PointerType(I8)
VOID = ir.VoidType()
Value: TypeAlias = Any
"""An `ir.Value`; llvmlite has no types of its own."""
Number: TypeAlias = Any
"""An `ir.Value` of 64 bits, or an `int`."""


def vector(of: ir.Type, lanes: int) -> ir.VectorType:
    """<lanes x of>"""
    return ir.VectorType(of, lanes)


class Code:
    """The body of one function. 64-bit integers may be given as Python's."""

    def __init__(self, function: ir.Function) -> None:
        self.function = function
        self.b = ir.IRBuilder(function.append_basic_block("entry"))

    # -- integers -----------------------------------------------------------------------------

    def i64(self, value: Number) -> Value:
        """A 64-bit integer."""
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def add(self, *terms: Number) -> Value:
        """Sum of 64-bit integers."""
        total = self.i64(terms[0])
        for term in terms[1:]:
            total = self.b.add(total, self.i64(term))
        return total

    def mul(self, a: Number, b: Number) -> Value:
        """Product of 64-bit integers."""
        return self.b.mul(self.i64(a), self.i64(b))

    def div(self, a: Number, b: Number) -> Value:
        """Quotient of non-negative 64-bit integers."""
        return self.b.udiv(self.i64(a), self.i64(b))

    def smaller(self, a: Number, b: Number) -> Value:
        """The smaller of two 64-bit integers."""
        a, b = self.i64(a), self.i64(b)
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    # -- control ------------------------------------------------------------------------------

    @contextmanager
    def loop(self, start: Number, stop: Number, step: Number = 1) -> Iterator[Value]:
        """for i in range(start, stop, step): …"""
        b = self.b
        head, body, end = (self.function.append_basic_block(n) for n in ("head", "body", "end"))
        counter = self.variable(I64)
        counter.set(self.i64(start))
        b.branch(head)
        b.position_at_end(head)
        i = counter.get()
        b.cbranch(b.icmp_signed("<", i, self.i64(stop)), body, end)
        b.position_at_end(body)
        yield i
        counter.set(b.add(i, self.i64(step), flags=["nsw"]))
        b.branch(head)
        b.position_at_end(end)

    def call(self, name: str, returns: ir.Type, *arguments: Value) -> Value:
        """Call the function `name`, declared by its arguments: an intrinsic, say."""
        known = self.function.module.globals.get(name)
        if known is None:
            kind = ir.FunctionType(returns, [a.type for a in arguments])
            known = ir.Function(self.function.module, kind, name)
        return self.b.call(known, arguments)

    # -- memory -------------------------------------------------------------------------------

    def variable(self, kind: ir.Type, value: Value | None = None) -> Variable:
        """A new variable, zero unless `value` is given."""
        with self.b.goto_entry_block():
            place = self.b.alloca(kind)
        variable = Variable(self, place)
        variable.set(ir.Constant(kind, None) if value is None else value)
        return variable

    def at(self, base: Value, offset: Number) -> Value:
        """base + offset bytes."""
        return self.b.gep(base, [self.i64(offset)], source_etype=I8)

    def load(self, kind: ir.Type, base: Value, offset: Number = 0) -> Value:
        """What is at base + offset bytes, at any alignment."""
        place = self.b.bitcast(self.at(base, offset), ir.PointerType(kind))
        return self.b.load(place, align=1)

    def store(self, value: Value, base: Value, offset: Number = 0) -> None:
        """Put `value` at base + offset bytes, at any alignment."""
        place = self.b.bitcast(self.at(base, offset), ir.PointerType(value.type))
        self.b.store(value, place, align=1)

    def prefetch(self, base: Value, offset: Number) -> None:
        """Fetch the line at base + offset bytes into the nearer caches; any address will do."""
        place = self.b.bitcast(self.at(base, offset), PTR)
        number = [ir.Constant(I32, n) for n in (0, 2, 1)]  # read, keep for long, data
        self.call("llvm.prefetch.p0", VOID, place, *number)

    # -- vectors ------------------------------------------------------------------------------

    def splat(self, value: Value, lanes: int) -> Value:
        """`value` in each lane."""
        nothing = ir.Constant(vector(value.type, lanes), ir.Undefined)
        first = self.b.insert_element(nothing, value, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, nothing, ir.Constant(vector(I32, lanes), [0] * lanes))

    def constant(self, of: ir.Type, value: float, lanes: int) -> Value:
        """The constant `value` in each lane."""
        return ir.Constant(vector(of, lanes), [value] * lanes)

    def total(self, value: Value) -> Value:
        """Sum of a vector's lanes, by halves."""
        lanes = value.type.count
        adds = self.b.fadd if value.type.element == FLOAT else self.b.add
        while lanes > 1:
            lanes //= 2
            nothing = ir.Constant(value.type, ir.Undefined)
            low, high = (
                self.b.shuffle_vector(
                    value, nothing, ir.Constant(vector(I32, lanes), list(range(i, i + lanes)))
                )
                for i in (0, lanes)
            )
            value = adds(low, high)
        return self.b.extract_element(value, ir.Constant(I32, 0))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a · b + c, rounded once where the CPU can."""
        return self.call(f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)


class Variable:
    """A value that changes."""

    def __init__(self, code: Code, place: Value) -> None:
        self._code = code
        self.place = place

    def get(self) -> Value:
        """Its value now."""
        return self._code.b.load(self.place)

    def set(self, value: Value) -> None:
        """Change it."""
        self._code.b.store(value, self.place)


def function(
    module: ir.Module, name: str, arguments: Sequence[ir.Type], *, inline: bool = False
) -> ir.Function:
    """A new function without a result; `inline` for one that has no life of its own."""
    made = ir.Function(module, ir.FunctionType(VOID, arguments), name)
    if inline:
        made.linkage = "internal"
        made.attributes.add("alwaysinline")
    return made
