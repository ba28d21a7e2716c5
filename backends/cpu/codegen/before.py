"""What stands before a linear layer, done on each row as it is made ready for the product.

==============  =============================================================================
`rms_norm`      x / √(mean x² + ε) · gain                       (Zhang and Sennrich 2019)
`layer_norm`    (x - mean x) / √(var x + ε) · gain + shift
`silu_mul`      silu(x) · other                                 (SwiGLU, Shazeer 2020)
`gelu`          `gelu_tanh` too: see `functions.py`
`times`         x · gain: the signs of a random transform
`hadamard`      x (O ⊗ H)ᵀ / √2^k                               (`butterfly.py`)
==============  =============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llvmlite import ir

from qcompiler.backends.cpu.codegen.butterfly import Butterfly
from qcompiler.backends.cpu.codegen.emit import FLOAT, Code, Value, Variable, vector
from qcompiler.backends.cpu.codegen.functions import FUNCTIONS
from qcompiler.backends.cpu.codegen.isa import Isa

Part = Callable[[Value, int], None]
"""(byte offset, lanes): what is done with these numbers of a row."""


@dataclass(frozen=True)
class Before:
    """One of them."""

    name: str
    number: float = 0.0
    """ε of a norm, the size of a transform."""
    core: int = 1
    """Of a transform."""

    @classmethod
    def parse(cls, text: str) -> tuple[Before, ...]:
        """`rms_norm:1e-05`, `silu_mul|hadamard:2816:11`: one after the other."""
        parts = [(*part.split(":"), "", "")[:3] for part in text.split("|") if part]
        return tuple(cls(name, float(n or 0), int(core or 1)) for name, n, core in parts)

    def __str__(self) -> str:
        core = f":{self.core}" if self.core > 1 else ""
        return f"{self.name}:{self.number!r}{core}" if self.number else self.name


class Row:
    """Writes the code that makes one row in `work`."""

    def __init__(self, code: Code, isa: Isa, given: Mapping[str, Value], row: Value) -> None:
        self.code, self.isa, self.given, self.row = code, isa, given, row

    def write(self, chain: tuple[Before, ...], other: Value, work: Value) -> None:
        """`other` is the second row, where there is one."""
        for before in chain:
            if before.name in ("rms_norm", "layer_norm"):
                self._norm(before, work)
            elif before.name == "hadamard":
                transform = Butterfly(self.code, self.isa, int(before.number), before.core)
                transform.write(self.row, work)
            else:
                self._function(before.name, other, work)
            self.row = work

    def _function(self, name: str, other: Value, work: Value) -> None:
        function = FUNCTIONS.get(name.removesuffix("_mul"))

        def part(offset: Value, lanes: int) -> None:
            value = self._load(self.row, offset, lanes)
            if function is not None:
                value = function(self.code, value)
            if name == "times":
                value = self.code.b.fmul(value, self._load(self.given["gain"], offset, lanes))
            if name == "silu_mul":
                value = self.code.b.fmul(value, self._load(other, offset, lanes))
            self.code.store(value, work, offset)

        self._each(part)

    def _norm(self, before: Before, work: Value) -> None:
        code, b = self.code, self.code.b
        count = b.uitofp(self.given["width"], FLOAT)
        centred = before.name == "layer_norm"
        mean = b.fdiv(self._sum(lambda x: x), count) if centred else ir.Constant(FLOAT, 0.0)

        def less(x: Value) -> Value:
            return b.fsub(x, code.splat(mean, x.type.count)) if centred else x

        squares = self._sum(lambda x: b.fmul(less(x), less(x)))
        power = b.fadd(b.fdiv(squares, count), ir.Constant(FLOAT, before.number))
        root = code.call("llvm.sqrt.f32", FLOAT, power)
        factor = b.fdiv(ir.Constant(FLOAT, 1.0), root)

        def part(offset: Value, lanes: int) -> None:
            value = b.fmul(less(self._load(self.row, offset, lanes)), code.splat(factor, lanes))
            value = b.fmul(value, self._load(self.given["gain"], offset, lanes))
            if centred:
                value = b.fadd(value, self._load(self.given["shift"], offset, lanes))
            code.store(value, work, offset)

        self._each(part)

    def _load(self, row: Value, offset: Value, lanes: int) -> Value:
        return self.code.load(vector(FLOAT, lanes), row, offset)

    def _each(self, part: Part) -> None:
        """All numbers of a row, by vectors, and what is left one by one."""
        code, lanes = self.code, self.isa.lanes
        whole = code.mul(code.div(self.given["width"], lanes), lanes)
        with code.loop(0, whole, lanes) as i:
            part(code.mul(i, 4), lanes)
        with code.loop(whole, self.given["width"]) as i:
            part(code.mul(i, 4), 1)

    def _sum(self, of: Callable[[Value], Value]) -> Value:
        totals: dict[int, Variable] = {}
        for lanes in (self.isa.lanes, 1):
            totals[lanes] = self.code.variable(vector(FLOAT, lanes))

        def part(offset: Value, lanes: int) -> None:
            total = totals[lanes]
            total.set(self.code.b.fadd(total.get(), of(self._load(self.row, offset, lanes))))

        for total in totals.values():  # a variable keeps what the row before left in it
            total.set(ir.Constant(total.get().type, None))
        self._each(part)
        wide, rest = (self.code.total(totals[lanes].get()) for lanes in (self.isa.lanes, 1))
        return self.code.b.fadd(wide, rest)
