"""int8 activations as int16, of each four the even ones first: what `dots.ReadyDots` reads.

Where 8 bits are multiplied in 16, each tile would widen its inputs anew; here it is done once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from llvmlite import ir

from qcompiler.backends.cpu.codegen.emit import I16, I32, Code, Value, vector
from qcompiler.backends.cpu.codegen.frame import Kernel, share
from qcompiler.backends.cpu.codegen.isa import Isa

POINTERS = ("x", "y")
SIZES = ("rows", "width", "x_stride", "y_stride")
"""`width` is bytes of a row of x, a multiple of 32; strides are bytes from one row to the next."""


@lru_cache(maxsize=4)
def widen(isa: Isa) -> Kernel:
    """The kernel. Frame: POINTERS, SIZES, threads."""
    return Kernel.of("widen", isa, SIZES, POINTERS, _write)


def _write(code: Code, given: Mapping[str, Value], thread: Value, threads: Value) -> None:
    b, lanes = code.b, 8
    eight = code.constant(I16, 8, 2 * lanes)
    wide = vector(I32, lanes)
    order = [n for i in range(lanes) for n in (i, lanes + i)]
    with code.loop(*share(code, given["rows"], thread, threads)) as row:
        x = code.at(given["x"], code.mul(row, given["x_stride"]))
        y = code.at(given["y"], code.mul(row, given["y_stride"]))
        with code.loop(0, given["width"], 4 * lanes) as at:
            short = code.load(vector(I16, 2 * lanes), x, at)
            even = b.bitcast(b.ashr(b.shl(short, eight), eight), wide)
            odd = b.bitcast(b.ashr(short, eight), wide)
            both = b.shuffle_vector(even, odd, ir.Constant(vector(I32, 2 * lanes), order))
            code.store(both, y, code.mul(at, 2))
