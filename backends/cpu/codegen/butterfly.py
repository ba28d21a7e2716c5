"""A fast transform of one row in memory, x (O ⊗ H₂ ⊗ … ⊗ H₂)ᵀ / √2^k, of n = c 2^k numbers.

Numbers are added and subtracted, (a, b) → (a + b, a - b), in k stages of growing distance; what is
nearer than a vector is wide stays in a register. Then O (`qcompiler/cores.py`) mixes the c runs of
2^k. Its rows have two or three different entries, so that a row is a sum over all numbers and one
over some of them: less than c / 2 additions, all numbers of a vector at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

from llvmlite import ir

from qcompiler.backends.cpu.codegen.emit import FLOAT, I32, Code, Number, Value, vector
from qcompiler.backends.cpu.codegen.isa import Isa
from qcompiler.cores import orthogonal_core

LARGEST = 128
"""Core whose additions are written out one by one."""
BLOCK = 2048
"""Numbers that go through all their stages while they are in the first cache."""


def has_butterfly(n: int, core: int) -> bool:
    """Whether there is code for a transform of `n` numbers with O_core."""
    size, rest = divmod(n, core)
    return rest == 0 and size > 0 and size & (size - 1) == 0 and core <= LARGEST


class Butterfly:
    """Writes the code of a transform of `n` numbers."""

    def __init__(self, code: Code, isa: Isa, n: int, core: int) -> None:
        assert has_butterfly(n, core)
        self.code, self.isa, self.n, self.core = code, isa, n, core
        self.size = n // core

    def write(self, source: Value, row: Value) -> None:
        """From `source` to `row`, which may be one."""
        code, block = self.code, min(self.size, BLOCK)
        with code.loop(0, self.n, block) as start:
            begin = code.mul(start, 4)
            here = code.at(row, begin)
            done = self._near(code.at(source, begin), here, block)
            self._far(here, block, done, block)
        self._far(row, self.n, block, self.size)
        if self.core > 1:
            self._each(self.size, lambda at, lanes: self._mix(row, at, lanes))

    def _mix(self, row: Value, at: Value, lanes: int) -> None:
        """O on the numbers at `at` of all runs."""
        code, kind = self.code, vector(FLOAT, lanes)
        places = [code.add(at, 4 * self.size * run) for run in range(self.core)]
        sums = _Sums(code, [code.load(kind, row, place) for place in places])
        whole = sums.of(range(self.core))
        matrix = orthogonal_core(self.core)
        assert matrix is not None
        for place, entries in zip(places, matrix.tolist(), strict=True):
            runs: dict[float, list[int]] = {}
            for run, entry in enumerate(entries):
                runs.setdefault(round(entry, 12), []).append(run)
            common = max(runs, key=lambda entry: len(runs[entry]))
            y = code.b.fmul(whole, code.constant(FLOAT, common, lanes))
            for entry in runs.keys() - {common}:
                y = code.fma(sums.of(runs[entry]), code.constant(FLOAT, entry - common, lanes), y)
            code.store(y, row, place)

    def _near(self, source: Value, row: Value, count: int) -> int:
        """1 / √2^k and the stages within four vectors; the distance of the next one."""
        code, lanes = self.code, min(self.isa.lanes, self.size)
        together = min(4, self.size // lanes)
        kind = vector(FLOAT, lanes)
        with code.loop(0, count, lanes * together) as i:
            places = [code.mul(code.add(i, lanes * j), 4) for j in range(together)]
            x = [code.load(kind, source, place) for place in places]
            x = [code.b.fmul(v, code.constant(FLOAT, self.size**-0.5, lanes)) for v in x]
            distance = 1
            while distance < lanes:
                order = ir.Constant(vector(I32, lanes), [n ^ distance for n in range(lanes)])
                signs = [-1.0 if n & distance else 1.0 for n in range(lanes)]
                nothing = ir.Constant(kind, ir.Undefined)
                x = [
                    code.fma(v, ir.Constant(kind, signs), code.b.shuffle_vector(v, nothing, order))
                    for v in x
                ]
                distance *= 2
            for place, value in zip(places, self._crossed(x), strict=True):
                code.store(value, row, place)
        return lanes * together

    def _far(self, row: Value, count: int, distance: int, end: int) -> None:
        """The stages from `distance` to before `end` of `count` numbers, two at once."""
        code = self.code
        while distance < end:
            radix = 4 if 4 * distance <= end else 2
            with code.loop(0, count, radix * distance) as start:
                places = [code.mul(code.add(start, i * distance), 4) for i in range(radix)]

                def part(at: Value, lanes: int, places: list[Value] = places) -> None:
                    kind = vector(FLOAT, lanes)
                    x = [code.load(kind, row, code.add(p, at)) for p in places]
                    for place, value in zip(places, self._crossed(x), strict=True):
                        code.store(value, row, code.add(place, at))

                self._each(distance, part)
            distance *= radix

    def _crossed(self, x: list[Value]) -> list[Value]:
        """x (H₂ ⊗ …): (a, b) → (a + b, a - b), then by fours."""
        b, step = self.code.b, 1
        while step < len(x):
            x = [
                b.fsub(x[i ^ step], x[i]) if i & step else b.fadd(x[i], x[i ^ step])
                for i in range(len(x))
            ]
            step *= 2
        return x

    def _each(self, count: int, part: Callable[[Value, int], None]) -> None:
        """`part` of `count` numbers, by vectors, and what is left one by one."""
        whole = count - count % self.isa.lanes
        sizes: list[tuple[Number, Number, int]] = [(0, whole, self.isa.lanes), (whole, count, 1)]
        for first, last, lanes in sizes:
            if first < last:
                with self.code.loop(first, last, lanes) as i:
                    part(self.code.mul(i, 4), lanes)


class _Sums:
    """Sums of some of `numbers`. What they share is added once: each is a sum of the sums within
    fours (the method of the four Russians: Arlazarov, Dinic, Kronrod and Faradžev 1970)."""

    def __init__(self, code: Code, numbers: list[Value]) -> None:
        self._b, self._numbers = code.b, numbers
        self._known: dict[tuple[int, ...], Value] = {}

    def of(self, places: Iterable[int]) -> Value:
        fours = [tuple(four) for _, four in groupby(places, lambda place: place // 4)]
        parts = [self._within(four) for four in fours]
        while len(parts) > 1:  # by pairs, so that additions need not wait for one another
            odd = parts[len(parts) // 2 * 2 :]
            pairs = zip(parts[::2], parts[1::2], strict=False)
            parts = [self._b.fadd(p, q) for p, q in pairs] + odd
        return parts[0]

    def _within(self, four: tuple[int, ...]) -> Value:
        if four not in self._known:
            first, *rest = four
            number = self._numbers[first]
            self._known[four] = self._b.fadd(self._within(tuple(rest)), number) if rest else number
        return self._known[four]
