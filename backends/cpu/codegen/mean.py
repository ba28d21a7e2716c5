"""The mean over an image that has its channels last.

y[n, c] = Σ_p x[n, p, c] / pixels
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from llvmlite import ir

from qcompiler.backends.cpu.codegen.emit import FLOAT, Code, Value, vector
from qcompiler.backends.cpu.codegen.frame import Kernel, share
from qcompiler.backends.cpu.codegen.isa import Isa

POINTERS = ("x", "y")
SIZES = ("images", "pixels", "channels")
TOGETHER = 32
"""Pixels that are summed before they are added to the others: large sums swallow digits."""


@lru_cache(maxsize=16)
def mean(isa: Isa) -> Kernel:
    """The kernel, for float32. Frame: POINTERS, SIZES, threads."""
    return Kernel.of("mean", isa, SIZES, POINTERS, _Mean(isa).write)


class _Mean:
    def __init__(self, isa: Isa) -> None:
        self._isa = isa

    def write(self, code: Code, given: Mapping[str, Value], thread: Value, threads: Value) -> None:
        """The images of one thread: as many channels at a time as a vector has, then one by one."""
        channels, lanes = given["channels"], self._isa.lanes
        line = code.mul(channels, 4)
        whole = code.mul(code.div(channels, lanes), lanes)
        with code.loop(*share(code, given["images"], thread, threads)) as image:
            source = code.at(given["x"], code.mul(image, code.mul(given["pixels"], line)))
            to = code.at(given["y"], code.mul(image, line))
            for n, start, stop in ((lanes, code.i64(0), whole), (1, whole, channels)):
                with code.loop(start, stop, n) as channel:
                    at = code.mul(channel, 4)
                    self._column(code, given, code.at(source, at), code.at(to, at), line, n)

    def _column(
        self,
        code: Code,
        given: Mapping[str, Value],
        source: Value,
        to: Value,
        line: Value,
        lanes: int,
    ) -> None:
        b, kind = code.b, vector(FLOAT, lanes)
        pixels, nothing = given["pixels"], ir.Constant(kind, None)
        total, part, lost = (code.variable(kind) for _ in range(3))
        total.set(nothing)
        lost.set(nothing)
        with code.loop(0, pixels, TOGETHER) as first:
            part.set(nothing)
            with code.loop(first, code.smaller(code.add(first, TOGETHER), pixels)) as pixel:
                part.set(b.fadd(part.get(), code.load(kind, source, code.mul(pixel, line))))
            # What the sum does not hold is added with the next part (Kahan 1965).
            more = b.fsub(part.get(), lost.get())
            sums = b.fadd(total.get(), more)
            lost.set(b.fsub(b.fsub(sums, total.get()), more))
            total.set(sums)
        count = code.splat(b.uitofp(given["pixels"], FLOAT), lanes)
        code.store(b.fdiv(total.get(), count), to)
