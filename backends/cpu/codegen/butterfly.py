"""A Hadamard transform of one row in memory, x Hᵀ / √n with H = H₂ ⊗ … ⊗ H₂ ⊗ H_m.

n = 2^k m: first each run of m numbers is multiplied by the small matrix H_m, then runs are added
and subtracted, (a, b) → (a + b, a - b), in k stages of growing distance. What is nearer than a
vector is wide stays in a register.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from qcompiler.backends.cpu.codegen.emit import FLOAT, I32, PTR, Code, Number, Value, vector
from qcompiler.backends.cpu.codegen.isa import Isa
from qcompiler.hadamard import core_size, hadamard_core


def spare(isa: Isa, n: int) -> int:
    """Bytes of memory besides the row that a transform of `n` numbers works in."""
    return 4 * (n + isa.lanes) if core_size(n) != 1 else 0


class Butterfly:
    """Writes the code of a transform of `n` numbers."""

    def __init__(self, code: Code, isa: Isa, n: int) -> None:
        core = core_size(n)
        assert core is not None
        self.code, self.isa, self.n, self.core = code, isa, n, core

    def write(self, source: Value, row: Value, other: Value) -> None:
        """From `source` to `row`, which may be one; `other` is memory of `spare` bytes."""
        if self.core == 1:
            distance = self._inside(source, row)
        else:
            self._cores(source, other)
            distance, source = self.core, other
            if distance == self.n:
                self._each(self.n, lambda at, size: self._copy(other, row, at, size))
        while distance < self.n:
            start = row if self.core == 1 else source
            if 4 * distance <= self.n:
                self._stages(start, row, distance, 4)
                distance *= 4
            else:
                self._stages(start, row, distance, 2)
                distance *= 2
            source = row

    def _cores(self, row: Value, other: Value) -> None:
        """Each run of m numbers by H_m, into `other`; two at a time share the matrix."""
        code, lanes, m = self.code, self.isa.lanes, self.core
        vectors = -(-m // lanes)
        matrix = self._matrix(vectors * lanes)
        together = 1 if self.n == m else 2
        with code.loop(0, self.n // m, together) as run:
            firsts = [code.mul(code.add(run, r), 4 * m) for r in range(together)]
            sums = [[code.variable(vector(FLOAT, lanes)) for _ in range(vectors)] for _ in firsts]
            for sum_ in (s for part in sums for s in part):
                sum_.set(ir.Constant(vector(FLOAT, lanes), None))
            with code.loop(0, m) as i:
                column = code.mul(i, 4 * vectors * lanes)
                signs = [
                    code.load(vector(FLOAT, lanes), matrix, code.add(column, v * self.isa.bytes))
                    for v in range(vectors)
                ]
                for first, part in zip(firsts, sums, strict=True):
                    x = code.load(FLOAT, row, code.add(first, code.mul(i, 4)))
                    x = code.splat(x, lanes)
                    for sign, sum_ in zip(signs, part, strict=True):
                        sum_.set(code.fma(x, sign, sum_.get()))
            # What the last vector writes too much is the next run's, which is written after it.
            for first, part in zip(firsts, sums, strict=True):
                for v, sum_ in enumerate(part):
                    code.store(sum_.get(), other, code.add(first, v * self.isa.bytes))

    def _matrix(self, width: int) -> Value:
        """H_mᵀ / √n as a constant, rows of `width` numbers."""
        module = self.code.function.module
        name = f"hadamard_{self.n}_{width}"
        known = module.globals.get(name)
        if known is None:
            rows = (hadamard_core(self.core).t() * self.n**-0.5).tolist()
            numbers = [x for r in rows for x in (*r, *[0.0] * (width - self.core))]
            kind = ir.ArrayType(FLOAT, len(numbers))
            known = ir.GlobalVariable(module, kind, name)
            known.linkage, known.global_constant = "internal", True
            known.initializer = ir.Constant(kind, numbers)
        return self.code.b.bitcast(known, PTR)

    def _copy(self, source: Value, target: Value, at: Value, lanes: int) -> None:
        self.code.store(self.code.load(vector(FLOAT, lanes), source, at), target, at)

    def _inside(self, source: Value, row: Value) -> int:
        """The stages within a vector, and 1 / √n; the distance of the next one."""
        code, lanes = self.code, min(self.isa.lanes, self.n)
        kind = vector(FLOAT, lanes)
        with code.loop(0, self.n, lanes) as i:
            x = code.load(kind, source, code.mul(i, 4))
            x = code.b.fmul(x, code.constant(FLOAT, self.n**-0.5, lanes))
            distance = 1
            while distance < lanes:
                order = [n ^ distance for n in range(lanes)]
                signs = [-1.0 if n & distance else 1.0 for n in range(lanes)]
                swapped = code.b.shuffle_vector(
                    x, ir.Constant(kind, ir.Undefined), ir.Constant(vector(I32, lanes), order)
                )
                x = code.fma(x, ir.Constant(kind, signs), swapped)
                distance *= 2
            code.store(x, row, code.mul(i, 4))
        return lanes

    def _stages(self, source: Value, row: Value, distance: int, radix: int) -> None:
        """One stage, or two at once: (a, b, c, d) by H₂ ⊗ H₂."""
        code, b = self.code, self.code.b
        with code.loop(0, self.n, radix * distance) as start:
            places = [code.mul(code.add(start, i * distance), 4) for i in range(radix)]

            def part(at: Value, lanes: int, places: list[Value] = places) -> None:
                kind = vector(FLOAT, lanes)
                x = [code.load(kind, source, code.add(p, at)) for p in places]
                step = 1
                while step < radix:
                    x = [
                        b.fsub(x[i ^ step], x[i]) if i & step else b.fadd(x[i], x[i ^ step])
                        for i in range(radix)
                    ]
                    step *= 2
                for place, value in zip(places, x, strict=True):
                    code.store(value, row, code.add(place, at))

            self._each(distance, part)

    def _each(self, count: int, part: Callable[[Value, int], None]) -> None:
        """`part` of `count` numbers, by vectors, and what is left one by one."""
        whole = count - count % self.isa.lanes
        sizes: list[tuple[Number, Number, int]] = [(0, whole, self.isa.lanes), (whole, count, 1)]
        for first, last, lanes in sizes:
            if first < last:
                with self.code.loop(first, last, lanes) as i:
                    part(self.code.mul(i, 4), lanes)
