"""Rotary position embedding of halves, row by row in any memory order.

y[i] = x[i] cos[i] - x[j] sin[i]        y[j] = x[j] cos[j] + x[i] sin[j]        j = i + d/2
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from llvmlite import ir

from qcompiler.backends.cpu.codegen.emit import FLOAT, Code, Value, vector
from qcompiler.backends.cpu.codegen.frame import Kernel, entry, share
from qcompiler.backends.cpu.codegen.isa import Isa

POINTERS = ("y", "x", "cos", "sin")
AXES = ("batch", "heads", "tokens")
SIZES = (*AXES, "half", *(f"{name}_{axis}" for name in POINTERS for axis in AXES))
"""Sizes, and bytes from one index of an axis to the next; 0 where it is broadcast."""


@lru_cache(maxsize=8)
def rope(isa: Isa) -> Kernel:
    """The kernel. Frame: POINTERS, SIZES, threads."""
    return Kernel(module(isa), isa, len(POINTERS) + len(SIZES) + 1)


def module(isa: Isa) -> ir.Module:
    """Its IR."""
    made = ir.Module("rope")

    def body(code: Code, given: Mapping[str, Value], thread: Value, threads: Value) -> None:
        start, end = share(code, given["tokens"], thread, threads)
        with (
            code.loop(0, given["batch"]) as batch,
            code.loop(start, end) as token,
            code.loop(0, given["heads"]) as head,
        ):
            _row(code, isa, given, {"batch": batch, "heads": head, "tokens": token})

    entry(made, SIZES, POINTERS, body)
    return made


def _row(code: Code, isa: Isa, given: Mapping[str, Value], index: Mapping[str, Value]) -> None:
    rows = {
        name: code.at(
            given[name], code.add(*(code.mul(index[a], given[f"{name}_{a}"]) for a in AXES))
        )
        for name in POINTERS
    }
    half = given["half"]
    whole = code.mul(code.div(half, isa.lanes), isa.lanes)
    for lanes, first, last in ((isa.lanes, code.i64(0), whole), (1, whole, half)):
        with code.loop(first, last, lanes) as i:
            low, high = code.mul(i, 4), code.mul(code.add(i, half), 4)
            values = {
                (name, place): code.load(vector(FLOAT, lanes), rows[name], offset)
                for name in ("x", "cos", "sin")
                for place, offset in (("low", low), ("high", high))
            }
            b = code.b
            turned = b.fmul(values["x", "high"], values["sin", "low"])
            y = b.fsub(b.fmul(values["x", "low"], values["cos", "low"]), turned)
            code.store(y, rows["y"], low)
            turned = b.fmul(values["x", "low"], values["sin", "high"])
            y = b.fadd(b.fmul(values["x", "high"], values["cos", "high"]), turned)
            code.store(y, rows["y"], high)
