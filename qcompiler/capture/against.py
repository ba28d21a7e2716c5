"""A program held against what it came from: the module's own numbers, or an exported program's
guards.

A number that Python computes from a size, such as `int(0.5 * x.shape[1])`, is a constant in the
graph: at another size the program runs, and is wrong. So is one made of the values of an example.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from qcompiler.capture.leave import left
from qcompiler.check import is_decided, output_errors
from qcompiler.errors import BadInput, first_line
from qcompiler.program import Program
from qcompiler.samples import Flat, random_inputs

Judge = Callable[[Program, Flat, Flat], str]
"""(program, inputs, its outputs) → what is wrong with them; empty if nothing is."""
CLOSE = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Relative error up to which outputs are the same: the same operators ran, in the same type."""
ROUGH = 5e-2
"""The same in 16 bits."""
TURNED = 0.1
"""The share of integers that may differ: some are decided by numbers, and turn with last digits."""


def by_numbers(module: torch.nn.Module) -> Judge:
    """Judges by what `module` itself returns."""

    def judge(program: Program, inputs: Flat, outputs: Flat) -> str:
        wanted = _eager(module, program, inputs)
        if wanted is None:  # it does not take such inputs: nothing to compare with
            return ""
        for a, b in _tensors(wanted, outputs):
            if a.shape != b.shape:
                return f"an output has shape {[*b.shape]}, the module's {[*a.shape]}"
        numbers, decided = _apart(wanted, outputs)
        if _far(program, numbers):
            return f"its outputs differ from the module's, relative error {numbers:.2g}"
        if decided > TURNED:
            return f"{decided:.0%} of its integers differ from the module's"
        return ""

    return judge


def by_guards(exported: torch.export.ExportedProgram) -> Judge:
    """Judges by the conditions on inputs that torch left on an exported program."""
    module = exported.module()

    def judge(program: Program, inputs: Flat, outputs: Flat) -> str:
        args, kwargs = pytree.tree_unflatten(list(inputs), program.io.in_spec)
        try:
            with torch.no_grad():
                module(*args, **kwargs)
        except AssertionError as error:
            text = first_line(error)
            # `!=` leaves out single sizes, most for what torch reads out of a length of 1.
            return text if text.startswith("Guard failed") and " != " not in text else ""
        except Exception:  # a size at which it fails is told by the program itself
            return ""
        return ""

    return judge


def told(module: torch.nn.Module, program: Program, example: Flat) -> Program:
    """`program`, with a note and a warning if it does something else than `module` on other numbers
    than the example's: a branch on values, or a constant that was made of them."""
    drawn = random_inputs(program.io, 1, sizes_of(program, example))
    pairs = list(zip(example, drawn, strict=True))
    if not any(_is_numbers(x) for x, _ in pairs):
        return program
    inputs = tuple(y if _is_numbers(x) else x for x, y in pairs)
    try:
        outputs = program.flat(inputs)
    except Exception:  # random numbers need not be what the model takes
        return program
    wanted = _eager(module, program, inputs)
    numbers, _ = _apart(wanted, outputs) if wanted is not None else (0.0, 0.0)
    if not _far(program, numbers) or _draws(module, program, inputs):
        return program
    note = (
        "on other numbers than the example's the program does not do what the module does: its "
        f"outputs differ, relative error {numbers:.2g}. A number that was computed from the "
        "example's values is baked in, or a branch on them; rewrite it with tensor operators"
    )
    warnings.warn(note, stacklevel=2)
    first, *rest = program.history
    return replace(program, history=(replace(first, notes=(*first.notes, note)), *rest))


def check_stateless(module: torch.nn.Module, program: Program, example: Flat) -> None:
    """Refuse a module whose calls read what an earlier one has left in a buffer, as where only the
    first call fills it: in the program each call does."""
    drawn = random_inputs(program.io, 1, sizes_of(program, example))
    wanted = _eager(module, program, example, after=drawn)
    if wanted is None:  # the drawn numbers need not be what the model takes
        return
    numbers, decided = _apart(wanted, program.flat(example))
    far = _far(program, numbers) or decided > TURNED
    if far and not _draws(module, program, example):
        raise BadInput(
            "the model reads what an earlier call has written into a buffer; expected a function "
            "without state. Write the buffer at each call, or before the model is captured"
        )


def sizes_of(program: Program, example: Flat) -> dict[str, int]:
    """The size of each dynamic dimension in an example."""
    return {
        dim: x.shape[axis]
        for port, x in zip(program.io.ports, example, strict=False)
        if isinstance(x, Tensor)
        for axis, dim in enumerate(port.shape)
        if isinstance(dim, str)
    }


def _is_numbers(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _eager(
    module: torch.nn.Module, program: Program, inputs: Flat, after: Flat | None = None
) -> list[object] | None:
    """What `module` returns, called with `after` first; None if it cannot be called so. It, and
    torch's random numbers, are left as they were."""
    # Where a mask hides tokens, torch's encoder has a faster way with other numbers in their place.
    fast = torch.backends.mha.get_fastpath_enabled()
    calls = []
    for flat in (inputs,) if after is None else (after, inputs):
        own = (x.clone() if isinstance(x, Tensor) else x for x in flat)  # it may write into them
        calls.append(pytree.tree_unflatten(own, program.io.in_spec))
    torch.backends.mha.set_fastpath_enabled(False)
    plain = torch.compiler.set_stance("force_eager")  # compiling would take minutes
    try:
        with plain, torch.no_grad(), left(module), torch.random.fork_rng(devices=[]):
            for args, kwargs in calls:
                found = pytree.tree_leaves(module(*args, **kwargs))
    except Exception:  # whatever a model's own code raises
        return None
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    # A table that torch.export left in a cache outside the module has no values.
    return None if any(isinstance(x, FakeTensor) for x in found) else found


def _far(program: Program, error: float) -> bool:
    """Whether numbers of a program are others than the module's."""
    return error > CLOSE.get(program.dtype, ROUGH)


def _apart(wanted: list[object], outputs: Flat) -> tuple[float, float]:
    """The largest error of numbers, and of integers."""
    errors = [(is_decided(a), output_errors(a, b)[0]) for a, b in _tensors(wanted, outputs)]
    numbers = [e for decided, e in errors if not decided]
    return max(numbers, default=0.0), max((e for decided, e in errors if decided), default=0.0)


def _tensors(wanted: list[object], outputs: Flat) -> list[tuple[Tensor, Tensor]]:
    """Those that are in both: a cache that the program leaves out comes last."""
    pairs = zip(wanted, outputs, strict=False)
    return [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]


def _draws(module: torch.nn.Module, program: Program, inputs: Flat) -> bool:
    """Whether the module differs from itself: it draws random numbers."""
    with torch.random.fork_rng(devices=[]):
        first = _eager(module, program, inputs)
        torch.manual_seed(torch.initial_seed() + 1)
        second = _eager(module, program, inputs)
    return first is None or second is None or any(_apart(first, tuple(second)))
