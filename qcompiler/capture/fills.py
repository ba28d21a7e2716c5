"""Which arguments may be left out of a call, though the captured program has them.

An argument whose default is None is filled with ones, or zeros, where the program with these does
what the module does without the argument, on inputs of other sizes than the example's: a mask that
hides nothing, token types of a single text.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler.capture.leave import left
from qcompiler.check import relative_error
from qcompiler.program import Program
from qcompiler.samples import random_inputs

SAME = {torch.float64: 1e-5, torch.float32: 1e-5}
"""Relative error of the outputs up to which two calls are one: a mask of ones is added up."""
ROUGH = 1e-2
"""The same in 16 bits."""


def fills(module: torch.nn.Module, program: Program) -> dict[str, float]:
    """Argument → what it may be filled with."""
    parameters = inspect.signature(module.forward).parameters
    calls = [_given(program, seed) for seed in (1, 2)]
    found: dict[str, float] = {}
    for name, value in calls[0].items():
        optional = name in parameters and parameters[name].default is None
        if not optional or not isinstance(value, Tensor) or not value.numel():
            continue
        wanted = [_without(module, name, given) for given in calls]
        numbers = (0, 1) if value.is_floating_point() else (1, 0)
        for number in numbers if None not in wanted else ():
            pairs = zip(calls, wanted, strict=True)
            if all(_same(program, given, name, number, w) for given, w in pairs):
                found[name] = number
                break
    return found


def _given(program: Program, seed: int) -> dict[str, object]:
    args, kwargs = pytree.tree_unflatten(random_inputs(program.io, seed), program.io.in_spec)
    return {**dict(zip(program.io.names, args, strict=False)), **kwargs}


def _without(
    module: torch.nn.Module, name: str, given: Mapping[str, object]
) -> list[object] | None:
    """What the module returns without the argument; None if it cannot be called like that."""
    try:
        with torch.no_grad(), left(module):
            return pytree.tree_leaves(module(**{k: v for k, v in given.items() if k != name}))
    except Exception:  # whatever a model's own code raises when it is called in another way
        return None


def _same(
    program: Program,
    given: Mapping[str, object],
    name: str,
    number: float,
    wanted: list[object] | None,
) -> bool:
    value = given[name]
    assert isinstance(value, Tensor) and wanted is not None
    filled = {**given, name: torch.full_like(value, number)}
    try:
        outputs = program.flat(program.io.flatten((), filled))
        error = relative_error(wanted[: len(outputs)], list(outputs))
    except Exception:  # it need not run with such numbers, or it returns something else
        return False
    return error <= SAME.get(program.dtype, ROUGH)
