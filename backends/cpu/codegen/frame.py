"""Kernels as functions of one address, that of a list of 64-bit numbers: a frame.

Pointers and sizes lie in it, so that Python fills it once and a call takes one argument, and so
that threads are handed it as it is. Its last number is how many threads may work.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from llvmlite import ir

from qcompiler.backends.cpu.codegen.emit import I32, I64, PTR, VOID, Code, Value, function
from qcompiler.backends.cpu.codegen.isa import Isa
from qcompiler.backends.cpu.codegen.jit import COUNT, PARALLEL, THREAD, compiled, openmp

ENTRY = "run"
Body = Callable[[Code, Mapping[str, Value], Value, Value], None]
"""(code, numbers of the frame by name, number of this thread, number of threads)"""


def entry(module: ir.Module, numbers: Sequence[str], pointers: Sequence[str], body: Body) -> None:
    """The function `run` of a frame: `pointers`, then `numbers`, then the threads to use."""
    worker = function(module, "worker", [PTR, I64, I64], inline=True)
    _worker(worker, [*pointers, *numbers], len(pointers), body)
    run = function(module, ENTRY, [PTR])
    code, threads_at = Code(run), 8 * (len(pointers) + len(numbers))
    frame = run.args[0]
    if openmp():
        threads = code.load(I64, frame, threads_at)
        with code.b.if_then(code.b.icmp_signed(">", threads, code.i64(1))):
            member = _member(module, worker)
            count = code.b.trunc(threads, I32)
            code.call(PARALLEL, VOID, member, frame, count, ir.Constant(I32, 0))
            code.b.ret_void()
    code.b.call(worker, [frame, code.i64(0), code.i64(1)])
    code.b.ret_void()


def _worker(worker: ir.Function, names: Sequence[str], pointers: int, body: Body) -> None:
    code = Code(worker)
    frame, thread, threads = worker.args
    given = {}
    for place, name in enumerate(names):
        value = code.load(I64, frame, 8 * place)
        given[name] = code.b.inttoptr(value, PTR) if place < pointers else value
    body(code, given, thread, threads)
    code.b.ret_void()


def _member(module: ir.Module, worker: ir.Function) -> ir.Function:
    """What each thread of a team runs."""
    member = function(module, "member", [PTR])
    code = Code(member)
    frame = member.args[0]
    thread = code.b.sext(code.call(THREAD, I32), I64)
    # As many as came, which may be fewer than were asked for.
    count = code.b.sext(code.call(COUNT, I32), I64)
    code.b.call(worker, [frame, thread, count])
    code.b.ret_void()
    return member


def share(code: Code, count: Value, thread: Value, threads: Value) -> tuple[Value, Value]:
    """This thread's part of range(count), as its start and end."""
    start = code.div(code.mul(count, thread), threads)
    return start, code.div(code.mul(count, code.add(thread, 1)), threads)


class Kernel:
    """A compiled frame function."""

    def __init__(self, module: ir.Module, isa: Isa, size: int) -> None:
        """`size`: numbers in a frame."""
        (address,) = compiled(module, isa, (ENTRY,))
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(address)
        self._pack = struct.Struct(f"{size}q").pack

    @classmethod
    def of(
        cls, name: str, isa: Isa, numbers: Sequence[str], pointers: Sequence[str], body: Body
    ) -> Kernel:
        """The kernel that `body` writes, in a module of its own."""
        made = ir.Module(name)
        entry(made, numbers, pointers, body)
        return cls(made, isa, len(numbers) + len(pointers) + 1)

    def bound(self, *frame: int) -> Callable[[], None]:
        """A call with this frame: addresses, sizes, threads."""
        return partial(self._run, self._pack(*frame))
