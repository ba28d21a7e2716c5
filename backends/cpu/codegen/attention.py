"""Attention of a few queries over a cache of keys and values.

    p = softmax(q Kᵀ scale)        y = p V

A head and a query at a time: its scores lie in `work`, one row for each thread. Grouped queries
read the keys and values of their group. A query that may look at nothing gives zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from llvmlite import ir

from qcompiler.backends.cpu.codegen.emit import FLOAT, I8, Code, Value, vector
from qcompiler.backends.cpu.codegen.frame import Kernel, entry, share
from qcompiler.backends.cpu.codegen.functions import exp
from qcompiler.backends.cpu.codegen.isa import Isa

POINTERS = ("y", "q", "k", "v", "mask", "scale", "work")
"""`mask` is bool, or 0 for none; `scale` one float32."""
AXES = ("batch", "heads", "tokens")
SIZES = (
    *AXES, "past", "group",
    *(f"{name}_{axis}" for name in ("y", "q", "k", "v", "mask") for axis in AXES),
)  # fmt: skip
"""Sizes (`past`: keys; `group`: queries to a key), and bytes from
one index of an axis to the next."""
LOWEST = float("-inf")
TOGETHER = 8


@lru_cache(maxsize=8)
def attention(isa: Isa, width: int, masked: bool) -> Kernel:
    """The kernel for heads of `width` numbers, whole vectors. Frame: POINTERS, SIZES, threads."""
    return Kernel(module(isa, width, masked), isa, len(POINTERS) + len(SIZES) + 1)


def module(isa: Isa, width: int, masked: bool) -> ir.Module:
    """Its IR."""
    made = ir.Module("attention")

    def body(code: Code, given: Mapping[str, Value], thread: Value, threads: Value) -> None:
        start, end = share(code, code.mul(given["batch"], given["heads"]), thread, threads)
        row = code.mul(code.add(given["past"], isa.lanes), 4)
        work = code.at(given["work"], code.mul(thread, row))
        with code.loop(start, end) as both, code.loop(0, given["tokens"]) as token:
            batch = code.div(both, given["heads"])
            head = code.b.urem(both, given["heads"])
            index = {"batch": batch, "heads": head, "tokens": token}
            _Query(code, isa, given, index, work, width // isa.lanes, masked).write()

    entry(made, SIZES, POINTERS, body)
    return made


class _Query:
    """One query of one head."""

    def __init__(
        self,
        code: Code,
        isa: Isa,
        given: Mapping[str, Value],
        index: Mapping[str, Value],
        work: Value,
        vectors: int,
        masked: bool,
    ) -> None:
        self.code, self.isa, self.given, self.work = code, isa, given, work
        self.offsets = [i * isa.bytes for i in range(vectors)]
        self.masked = masked
        self.kind = vector(FLOAT, isa.lanes)
        group = {**index, "heads": code.div(index["heads"], given["group"]), "tokens": code.i64(0)}
        self.q, self.y, self.mask = (self._row(n, index) for n in ("q", "y", "mask"))
        self.k, self.v = (self._row(n, group) for n in ("k", "v"))

    def _row(self, name: str, index: Mapping[str, Value]) -> Value:
        code, given = self.code, self.given
        return code.at(
            given[name], code.add(*(code.mul(index[a], given[f"{name}_{a}"]) for a in AXES))
        )

    def write(self) -> None:
        largest = self._scores()
        total = self._weights(largest)
        b = self.code.b
        nothing = b.fcmp_ordered("==", total, ir.Constant(FLOAT, 0.0))
        one, zero = (ir.Constant(FLOAT, n) for n in (1.0, 0.0))
        self._mix(b.select(nothing, zero, b.fdiv(one, total)))

    def _scores(self) -> Value:
        """Fill `work`, and behind it a vector of the lowest; the largest."""
        code, b = self.code, self.code.b
        largest = code.variable(FLOAT)
        largest.set(ir.Constant(FLOAT, LOWEST))
        scale = code.load(FLOAT, self.given["scale"])
        query = [code.load(self.kind, self.q, offset) for offset in self.offsets]
        with code.loop(0, self.given["past"]) as t:
            key = code.at(self.k, code.mul(t, self.given["k_tokens"]))
            dot = ir.Constant(self.kind, None)
            for part, offset in zip(query, self.offsets, strict=True):
                dot = code.fma(part, code.load(self.kind, key, offset), dot)
            score = b.fmul(code.total(dot), scale)
            if self.masked:
                seen = b.icmp_unsigned("!=", code.load(I8, self.mask, t), ir.Constant(I8, 0))
                score = b.select(seen, score, ir.Constant(FLOAT, LOWEST))
            code.store(score, self.work, code.mul(t, 4))
            larger = b.fcmp_ordered(">", score, largest.get())
            largest.set(b.select(larger, score, largest.get()))
        lowest = code.constant(FLOAT, LOWEST, self.isa.lanes)
        code.store(lowest, self.work, code.mul(self.given["past"], 4))
        return largest.get()

    def _weights(self, largest: Value) -> Value:
        """e^(score - largest) in the place of the scores; their sum."""
        code, b, lanes = self.code, self.code.b, self.isa.lanes
        total = code.variable(self.kind)
        total.set(ir.Constant(self.kind, None))
        lowest = code.constant(FLOAT, LOWEST, lanes)
        with code.loop(0, self.given["past"], lanes) as t:
            scores = code.load(self.kind, self.work, code.mul(t, 4))
            weights = exp(code, b.fsub(scores, code.splat(largest, lanes)))
            weights = b.select(
                b.fcmp_ordered("==", scores, lowest), ir.Constant(self.kind, None), weights
            )
            code.store(weights, self.work, code.mul(t, 4))
            total.set(b.fadd(total.get(), weights))
        return code.total(total.get())

    def _mix(self, factor: Value) -> None:
        """As many vectors at a time as there are registers for."""
        code = self.code
        for first in range(0, len(self.offsets), TOGETHER):
            offsets = self.offsets[first : first + TOGETHER]
            mixed = [code.variable(self.kind) for _ in offsets]
            for sum_ in mixed:
                sum_.set(ir.Constant(self.kind, None))
            with code.loop(0, self.given["past"]) as t:
                weight = code.splat(code.load(FLOAT, self.work, code.mul(t, 4)), self.isa.lanes)
                value = code.at(self.v, code.mul(t, self.given["v_tokens"]))
                for sum_, offset in zip(mixed, offsets, strict=True):
                    sum_.set(code.fma(weight, code.load(self.kind, value, offset), sum_.get()))
            for sum_, offset in zip(mixed, offsets, strict=True):
                scaled = code.b.fmul(sum_.get(), code.splat(factor, self.isa.lanes))
                code.store(scaled, self.y, offset)
