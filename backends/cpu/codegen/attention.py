"""Attention of a few queries over a cache of keys and values.

    p = softmax(q Kᵀ scale)        y = p V

with float32 keys and values, or int8 ones (`coded`) with a scale for each row, which is taken into
the scores and into p. A query of one head at a time, or of two that read the same keys and values
(grouped queries), which are then read once; scores lie in `work`, a row for each head and thread. A
query that may look at nothing gives zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from llvmlite import ir

from qcompiler.backends.cpu.codegen.emit import FLOAT, I8, I32, Code, Value, vector
from qcompiler.backends.cpu.codegen.frame import Kernel, entry, share
from qcompiler.backends.cpu.codegen.functions import exp
from qcompiler.backends.cpu.codegen.isa import Isa

ROWS = ("y", "q", "k", "v", "mask", "k_scale", "v_scale")
POINTERS = (*ROWS, "scale", "work")
"""`mask` is bool, or 0 for none; `scale` one number; `k_scale` and `v_scale` are for coded rows."""
AXES = ("batch", "heads", "tokens")
SIZES = (
    *AXES, "past", "group",
    *(f"{name}_{axis}" for name in ROWS for axis in AXES),
)  # fmt: skip
"""Sizes (`past`: keys; `group`: queries to a key), and bytes from
one index of an axis to the next."""
LOWEST = float("-inf")
TOGETHER = 8
"""Vectors of a result that are summed in registers."""


def heads_at_once(group: int) -> int:
    """How many of `group` heads that share keys and values are computed together."""
    return 1 if group % 2 else 2


@lru_cache(maxsize=16)
def attention(isa: Isa, width: int, masked: bool, coded: bool = False, heads: int = 1) -> Kernel:
    """The kernel for heads of `width` numbers, whole vectors, so many `heads` at once.

    Frame: POINTERS, SIZES, threads.
    """
    made = module(isa, width, masked, coded, heads)
    return Kernel(made, isa, len(POINTERS) + len(SIZES) + 1)


def module(isa: Isa, width: int, masked: bool, coded: bool = False, heads: int = 1) -> ir.Module:
    """Its IR."""
    made = ir.Module("attention")

    def body(code: Code, given: Mapping[str, Value], thread: Value, threads: Value) -> None:
        groups = code.div(given["heads"], heads)
        start, end = share(code, code.mul(given["batch"], groups), thread, threads)
        row = code.mul(code.add(given["past"], isa.lanes), 4)
        works = [code.mul(code.add(code.mul(thread, heads), n), row) for n in range(heads)]
        rows = [code.at(given["work"], work) for work in works]
        with code.loop(start, end) as both, code.loop(0, given["tokens"]) as token:
            first = code.mul(code.b.urem(both, groups), heads)
            index = {"batch": code.div(both, groups), "heads": first, "tokens": token}
            _Queries(code, isa, given, index, rows, width // isa.lanes, masked, coded).write()

    entry(made, SIZES, POINTERS, body)
    return made


class _Queries:
    """One query of each of a few heads that share their keys and values."""

    def __init__(
        self,
        code: Code,
        isa: Isa,
        given: Mapping[str, Value],
        index: Mapping[str, Value],
        works: list[Value],
        vectors: int,
        masked: bool,
        coded: bool,
    ) -> None:
        """`index` is that of the first head; `works` has a row of scores for each."""
        self.code, self.isa, self.given, self.works = code, isa, given, works
        self.offsets = [i * isa.bytes for i in range(vectors)]
        self.masked, self.coded = masked, coded
        self.kind = vector(FLOAT, isa.lanes)
        own = [{**index, "heads": code.add(index["heads"], n)} for n in range(len(works))]
        self.q, self.y, self.mask = ([self._row(n, i) for i in own] for n in ("q", "y", "mask"))
        group = {**index, "heads": code.div(index["heads"], given["group"]), "tokens": code.i64(0)}
        self.k, self.v = (self._row(n, group) for n in ("k", "v"))
        self.scales = {n: self._row(f"{n}_scale", group) for n in ("k", "v") if coded}

    def _row(self, name: str, index: Mapping[str, Value]) -> Value:
        code, given = self.code, self.given
        return code.at(
            given[name], code.add(*(code.mul(index[a], given[f"{name}_{a}"]) for a in AXES))
        )

    def _part(self, row: Value, offset: int) -> Value:
        """The vector of keys or values that lies at `offset` where numbers are float32."""
        code, lanes = self.code, self.isa.lanes
        if not self.coded:
            return code.load(self.kind, row, offset)
        codes = code.load(vector(I8, lanes), row, offset // 4)
        return code.b.sitofp(code.b.sext(codes, vector(I32, lanes)), self.kind)

    def _scale(self, name: str, token: Value) -> Value | None:
        """The scale of a row of keys or values."""
        if not self.coded:
            return None
        at = self.code.mul(token, self.given[f"{name}_scale_tokens"])
        return self.code.load(FLOAT, self.scales[name], at)

    def write(self) -> None:
        b = self.code.b
        one, zero = (ir.Constant(FLOAT, n) for n in (1.0, 0.0))
        factors = []
        for work, largest in zip(self.works, self._scores(), strict=True):
            total = self._weights(work, largest)
            nothing = b.fcmp_ordered("==", total, zero)
            factors.append(b.select(nothing, zero, b.fdiv(one, total)))
        self._mix(factors)

    def _scores(self) -> list[Value]:
        """Fill `works`, and behind each a vector of the lowest; the largest of each."""
        code, b = self.code, self.code.b
        lowest = ir.Constant(FLOAT, LOWEST)
        largest = [code.variable(FLOAT, lowest) for _ in self.works]
        scale = code.load(FLOAT, self.given["scale"])
        queries = [[code.load(self.kind, q, offset) for offset in self.offsets] for q in self.q]
        with code.loop(0, self.given["past"]) as t:
            key = code.at(self.k, code.mul(t, self.given["k_tokens"]))
            dots = [ir.Constant(self.kind, None) for _ in self.works]
            for place, offset in enumerate(self.offsets):
                part = self._part(key, offset)
                dots = [code.fma(q[place], part, d) for q, d in zip(queries, dots, strict=True)]
            own = self._scale("k", t)
            factor = scale if own is None else b.fmul(scale, own)
            for dot, mask, work, most in zip(dots, self.mask, self.works, largest, strict=True):
                score = b.fmul(code.total(dot), factor)
                if self.masked:
                    seen = b.icmp_unsigned("!=", code.load(I8, mask, t), ir.Constant(I8, 0))
                    score = b.select(seen, score, lowest)
                code.store(score, work, code.mul(t, 4))
                larger = b.fcmp_ordered(">", score, most.get())
                most.set(b.select(larger, score, most.get()))
        behind = code.mul(self.given["past"], 4)
        for work in self.works:
            code.store(code.constant(FLOAT, LOWEST, self.isa.lanes), work, behind)
        return [most.get() for most in largest]

    def _weights(self, work: Value, largest: Value) -> Value:
        """e^(score - largest) in the place of the scores; their sum."""
        code, b, lanes = self.code, self.code.b, self.isa.lanes
        total = code.variable(self.kind)
        total.set(ir.Constant(self.kind, None))
        lowest = code.constant(FLOAT, LOWEST, lanes)
        with code.loop(0, self.given["past"], lanes) as t:
            scores = code.load(self.kind, work, code.mul(t, 4))
            weights = exp(code, b.fsub(scores, code.splat(largest, lanes)))
            weights = b.select(
                b.fcmp_ordered("==", scores, lowest), ir.Constant(self.kind, None), weights
            )
            code.store(weights, work, code.mul(t, 4))
            total.set(b.fadd(total.get(), weights))
        return code.total(total.get())

    def _mix(self, factors: list[Value]) -> None:
        """As many vectors at a time as there are registers for; heads together where a vector takes
        work to read, not where half of each row would be."""
        outputs = list(zip(self.works, self.y, factors, strict=True))
        parts = [outputs] if self.coded else [[output] for output in outputs]
        for part in parts:
            step = TOGETHER // len(part)
            for first in range(0, len(self.offsets), step):
                self._mixed(part, self.offsets[first : first + step])

    def _mixed(self, outputs: list[tuple[Value, Value, Value]], offsets: list[int]) -> None:
        code, b = self.code, self.code.b
        nothing = ir.Constant(self.kind, None)
        mixed = [[code.variable(self.kind, nothing) for _ in offsets] for _ in outputs]
        with code.loop(0, self.given["past"]) as t:
            value = code.at(self.v, code.mul(t, self.given["v_tokens"]))
            parts = [self._part(value, offset) for offset in offsets]
            own = self._scale("v", t)
            for (work, _, _), sums in zip(outputs, mixed, strict=True):
                weight = code.load(FLOAT, work, code.mul(t, 4))
                weight = weight if own is None else b.fmul(weight, own)
                weight = code.splat(weight, self.isa.lanes)
                for sum_, part in zip(sums, parts, strict=True):
                    sum_.set(code.fma(weight, part, sum_.get()))
        for (_, y, factor), sums in zip(outputs, mixed, strict=True):
            for sum_, offset in zip(sums, offsets, strict=True):
                code.store(b.fmul(sum_.get(), code.splat(factor, self.isa.lanes)), y, offset)
