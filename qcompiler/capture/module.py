"""A torch module, exported with dynamic dimensions where it allows them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler.capture.against import by_numbers, check_stateless, told
from qcompiler.capture.checks import check_example, check_module, check_names, counted
from qcompiler.capture.dynamic import (
    Axes,
    axes_of,
    dynamic_shapes,
    is_sequence,
    noted,
    stuck_dims,
    two_or_more,
    wanted_axes,
)
from qcompiler.capture.export import export
from qcompiler.capture.exported import from_exported
from qcompiler.capture.fills import fills
from qcompiler.errors import BadInput
from qcompiler.io import as_call
from qcompiler.program import Program, check_finite

ATTEMPTS = 3
SUGGESTED = r"^\s*(\w+) = Dim\('\w+'(.*)\)$"
"""What torch writes of a named dimension that has bounds."""
STEPPED = r"^\s*(\w+) = [\d*]*_\w+(?: [+-] \d+)?$"
"""And of one that it would have as a multiple."""


def export_module(module: torch.nn.Module, example_inputs: object, dynamic: object) -> Program:
    """`torch.export` of `module` in evaluation mode; the module is left as it was."""
    args, kwargs = as_call(example_inputs)
    check_module(module)
    check_example((args, kwargs))
    check_finite(dict(module.named_parameters()))
    names = _forward_names(module, len(args))
    with inference(module):
        kwargs = _without_cache(module, kwargs)
        before = _writes(module)
        program = _exported(module, args, kwargs, names, dynamic)
        example = program.io.flatten(args, kwargs)
        program = told(module, program, example)
        if _writes(module) != before:  # when it was held against the program
            check_stateless(module, program, example)
        found, required = fills(module, program), _required(module, program)
    return replace(program, io=replace(program.io, fills=found, required=required))


def _writes(module: torch.nn.Module) -> list[int]:
    """How often each buffer has been written."""
    return [b._version for b in module.buffers() if not b.is_inference()]


def _exported(
    module: torch.nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    names: tuple[str, ...],
    dynamic: object,
) -> Program:
    call = (args, kwargs)
    if dynamic is not None and dynamic is not True:
        program = _exact(module, call, names, dynamic)
        if stuck := stuck_dims(program, program.io.flatten(args, kwargs), by_numbers(module)):
            raise BadInput(f"`dynamic` names what the model fixes: {'; '.join(stuck.values())}")
        return program
    refused, program = "", None
    try:
        program = _free(module, call, names, turned=False)
    except BadInput as error:
        refused = str(error)
    if _has_fixed_sequence(call, program):
        try:
            other = _free(module, call, names, turned=True)
        except BadInput:
            other = None
        if other is not None and len(other.io.dims) > (len(program.io.dims) if program else 0):
            return other
    if program is not None:
        return program
    # Some models fix a size in code; the example's own sizes may still go through.
    static = pytree.tree_map(lambda _: None, call)
    note = f"captured with the example's sizes only: {refused}"
    return from_exported(export(module, call, static), names, note)


def _free(module: torch.nn.Module, call: object, names: tuple[str, ...], turned: bool) -> Program:
    """Exported with all dimensions dynamic that can be, of those that are tried."""
    wide = pytree.tree_map_only(Tensor, lambda x: two_or_more(x, turned), call)
    fixed: Axes = frozenset()
    notes: list[str] = []
    while True:
        shapes = dynamic_shapes(wide, fixed, turned)
        program = from_exported(export(module, wide, shapes), names, "; ".join(notes))
        stuck = stuck_dims(program, program.io.flatten(*wide), by_numbers(module))
        more = axes_of(program, stuck) - fixed
        if not more:
            return noted(program, wanted_axes(wide, fixed, turned))
        fixed |= more
        notes += stuck.values()


def _has_fixed_sequence(call: object, program: Program | None) -> bool:
    """Whether there is a sequence whose axis 1 is fixed, as channels are that come first."""
    values = pytree.tree_leaves(call)
    if program is None:
        return any(map(is_sequence, values))
    ports = zip(values, program.io.ports, strict=True)
    return any(is_sequence(x) and isinstance(port.shape[1], int) for x, port in ports)


def _exact(
    module: torch.nn.Module,
    call: tuple[tuple[object, ...], dict[str, object]],
    names: tuple[str, ...],
    dynamic: object,
) -> Program:
    """Exported with the dimensions that are named, within bounds that torch finds for them."""
    bounds: dict[str, dict[str, int]] = {}
    loose: set[str] = set()
    for attempt in range(ATTEMPTS):
        shapes, axes = _exact_shapes(dynamic, *call, names, bounds, loose)
        try:
            return from_exported(export(module, call, shapes, named=True), names, axes=axes)
        except BadInput as error:
            said = str(error.__cause__)
            more = {
                name: {word: int(n) for word, n in re.findall(r"(min|max)=(\d+)", rest)}
                for name, rest in re.findall(SUGGESTED, said, re.M)
            }
            steps = set(re.findall(STEPPED, said, re.M)) - loose
            if not (more or steps) or attempt == ATTEMPTS - 1:
                raise
            bounds |= more
            loose |= steps
    raise AssertionError("the last attempt returns or raises")


def _exact_shapes(
    dynamic: object,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    names: tuple[str, ...],
    bounds: Mapping[str, Mapping[str, int]],
    loose: Collection[str],
) -> tuple[tuple[object, object], list[Mapping[int, str]]]:
    """What `torch.export` wants for (args, kwargs), and the names of each flat input's axes.

    `loose` ones may be any size at which the model runs: torch would have multiples alone, as of
    strided convolutions, which take others too."""
    wanted: Mapping[str, Mapping[int, str]] = dynamic if isinstance(dynamic, Mapping) else {}
    given = [*names[: len(args)], *kwargs]
    if unknown := [n for n in wanted if n not in given]:
        raise BadInput(f"dynamic names {unknown}, but the example inputs are {given}")
    check_names(wanted)
    pairs = [*zip(names, args, strict=False), *kwargs.items()]
    wanted = {n: counted(n, wanted[n], value) for n, value in pairs if n in wanted}
    every = {d for axes in wanted.values() for d in axes.values()}
    auto = torch.export.Dim.AUTO
    dims = {d: auto if d in loose else torch.export.Dim(d, **bounds.get(d, {})) for d in every}

    def shape(name: str, value: object) -> object:
        """The axes of an argument are those of each tensor in it: of a cache, say."""
        axes = {axis: dims[d] for axis, d in wanted.get(name, {}).items()} or None
        return pytree.tree_map(lambda v: axes if isinstance(v, Tensor) else None, value)

    positional = tuple(shape(n, a) for n, a in zip(names, args, strict=False))
    axes = [wanted.get(name, {}) for name, value in pairs for _ in pytree.tree_leaves(value)]
    return (positional, {k: shape(k, v) for k, v in kwargs.items()}), axes


def _required(module: torch.nn.Module, program: Program) -> frozenset[str]:
    """Constants for which the module's own forward has another default; None is none, and says
    that a configuration decides."""
    parameters = inspect.signature(module.forward).parameters
    plain = (bool, int, float, str)  # others need not compare
    given = {n: p.default for n, p in parameters.items() if isinstance(p.default, plain)}
    return frozenset(
        port.name
        for port in program.io.ports
        if not port.is_tensor and port.name in given and given[port.name] != port.constant
    )


def _forward_names(module: torch.nn.Module, count: int = 0) -> tuple[str, ...]:
    """Names of positional parameters, at least `count` if there may be any number."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters
    names = [n for n, p in parameters.items() if p.kind in kinds]
    many = [n for n, p in parameters.items() if p.kind is inspect.Parameter.VAR_POSITIONAL]
    return (*names, *(f"{n}_{i}" for n in many for i in range(count - len(names))))


def _without_cache(module: torch.nn.Module, kwargs: dict[str, object]) -> dict[str, object]:
    """A stateless program wants no cache object in its outputs: it is switched off."""
    # Parts of a model may have copies of its configuration, and use a cache when it does not.
    configs = [getattr(m, "config", None) for m in module.modules()]
    used = any(getattr(config, "use_cache", None) for config in configs)
    if used and "use_cache" in _forward_names(module):
        return {**kwargs, "use_cache": kwargs.get("use_cache", False)}
    return kwargs


@contextmanager
def inference(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and everything back as it was afterwards."""
    training = {m: m.training for m in module.modules()}
    gradients = {p: p.requires_grad for p in module.parameters()}
    try:
        module.eval().requires_grad_(False)
        yield
    finally:
        for m, flag in training.items():
            m.training = flag
        for p, flag in gradients.items():
            p.requires_grad_(flag)
