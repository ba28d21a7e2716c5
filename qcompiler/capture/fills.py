"""Which arguments of a module may be left out of a call, though the captured program has them.

An argument whose default is None is filled with ones, or zeros, where the module does the same with
these as without the argument: a mask that hides nothing, token types of a single text.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler.check import relative_error

SAME = 1e-5
"""Relative error of the outputs up to which the two calls are one; a mask of ones is added up."""


def fills(
    module: torch.nn.Module,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    names: tuple[str, ...],
) -> dict[str, float]:
    """Argument → what it may be filled with."""
    parameters = inspect.signature(module.forward).parameters
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    found: dict[str, float] = {}
    for name, value in given.items():
        optional = name in parameters and parameters[name].default is None
        if not optional or not isinstance(value, Tensor) or not value.numel():
            continue
        without = _outputs(module, {k: v for k, v in given.items() if k != name})
        for number in (1, 0) if without is not None else ():
            filled = _outputs(module, given | {name: torch.full_like(value, number)})
            if filled is not None and _same(without, filled):
                found[name] = number
                break
    return found


def _outputs(module: torch.nn.Module, given: Mapping[str, object]) -> list[object] | None:
    """None where the module cannot be called like that."""
    try:
        with torch.no_grad():
            return pytree.tree_leaves(module(**given))
    except Exception:  # whatever a model's own code raises when it is called in another way
        return None


def _same(a: object, b: object) -> bool:
    try:
        return relative_error(a, b) <= SAME
    except ValueError:  # outputs of another number
        return False
