"""What a convolution's outputs read: sums and scales of their patches, and the patches themselves.

    total[m] = Σ_t sum[place[m] + tap[t]]        scale[m] = s, or NaN where a sum is one

Pixels are numbered with their padding. Patches are copied only where channels are few: else a
product reads them where they are (`conv.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

from llvmlite import ir

from qcompiler.backends.cpu.codegen.emit import FLOAT, I8, I32, I64, Code, Value, vector
from qcompiler.backends.cpu.codegen.frame import Kernel, share
from qcompiler.backends.cpu.codegen.isa import Isa
from qcompiler.backends.cpu.codegen.pixels import zero_of

POINTERS = ("sum", "scale", "total", "scales", "places", "taps", "q", "patch", "runs",
            "zero", "next_sum", "targets")  # fmt: skip
SIZES = ("tokens", "taps_count", "alike", "pitch", "runs_count", "run", "row", "more")
"""Outputs; taps; outputs that share a scale; bytes of a pixel; runs of bytes that lie together in a
patch, bytes of one; bytes from one patch to the next; codes of zero that a product reads besides
what the sums of pixels count (or fewer, if negative)."""
SPANS = (16, 4, 1)
"""Bytes that are copied at once: as many as are left."""


@lru_cache(maxsize=16)
def patches(isa: Isa, copied: bool, handed: bool) -> Kernel:
    """The kernel; `copied` is whether patches are copied, `handed` whether marks of outputs
    are taken back. Frame: POINTERS, SIZES, threads."""
    return Kernel.of("patches", isa, SIZES, POINTERS, _Patches(copied, handed).write)


class _Patches:
    def __init__(self, copied: bool, handed: bool) -> None:
        self._copied, self._handed = copied, handed

    def write(self, code: Code, given: Mapping[str, Value], thread: Value, threads: Value) -> None:
        """The outputs of one thread."""
        zero = code.b.fptosi(zero_of(code, given), I8)
        with code.loop(*share(code, given["tokens"], thread, threads)) as token:
            place = code.load(I64, given["places"], code.mul(token, 8))
            self._sums(code, given, token, place, zero)
            if self._copied:
                self._copy(code, given, token, place, zero)
            if self._handed:
                target = code.load(I64, given["targets"], code.mul(token, 8))
                nothing = ir.Constant(FLOAT, 0.0)
                code.store(nothing, given["next_sum"], code.mul(target, 4))

    def _sums(
        self, code: Code, given: Mapping[str, Value], token: Value, place: Value, zero: Value
    ) -> None:
        b = code.b
        sums = code.variable(FLOAT)
        sums.set(ir.Constant(FLOAT, 0.0))
        with code.loop(0, given["taps_count"]) as tap:
            pixel = code.add(place, code.load(I64, given["taps"], code.mul(tap, 8)))
            sums.set(b.fadd(sums.get(), code.load(FLOAT, given["sum"], code.mul(pixel, 4))))
        wrong = b.fcmp_unordered("uno", sums.get(), sums.get())
        total = b.fptosi(b.select(wrong, ir.Constant(FLOAT, 0.0), sums.get()), I32)
        total = b.add(total, b.mul(b.sext(zero, I32), b.trunc(given["more"], I32)))
        scale = code.load(FLOAT, given["scale"], code.mul(code.div(token, given["alike"]), 4))
        scale = b.select(wrong, ir.Constant(FLOAT, math.nan), scale)
        code.store(total, given["total"], code.mul(token, 4))
        code.store(scale, given["scales"], code.mul(token, 4))

    def _copy(
        self, code: Code, given: Mapping[str, Value], token: Value, place: Value, zero: Value
    ) -> None:
        patch = code.at(given["patch"], code.mul(token, given["row"]))
        run = given["run"]
        with code.loop(0, given["runs_count"]) as i:
            pixel = code.add(place, code.load(I64, given["runs"], code.mul(i, 8)))
            source = code.at(given["q"], code.mul(pixel, given["pitch"]))
            to = code.at(patch, code.mul(i, run))
            start: Value = code.i64(0)
            for span in SPANS:
                stop = code.mul(code.div(run, span), span)
                with code.loop(start, stop, span) as at:
                    code.store(code.load(vector(I8, span), source, at), to, at)
                start = stop
        with code.loop(code.mul(given["runs_count"], run), given["row"]) as at:
            code.store(zero, patch, at)
