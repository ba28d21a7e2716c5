"""The outside of a program from a file: inputs and dynamic dimensions under the file's names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from torch import Tensor

from qcompiler.capture.checks import counted
from qcompiler.capture.onnx.interpret import model_inputs
from qcompiler.errors import BadInput
from qcompiler.io import Port
from qcompiler.program import Program

Axes = dict[int, str]
"""Axis → name of the dimension that the file leaves open there."""


def open_axes(model: ir.Model, example: Sequence[Tensor], dynamic: object) -> list[Axes]:
    """The dynamic axes of each input: those that the file leaves open, or what `dynamic` says.

    The example must fit what the file says of sizes.
    """
    declared = _declared(model, example)
    _check_equal(model, example, declared)
    if dynamic is False:
        return [{} for _ in example]
    if not isinstance(dynamic, Mapping):
        return declared
    names = [str(v.name) for v in model_inputs(model)]
    if unknown := [n for n in dynamic if n not in names]:
        raise BadInput(f"dynamic names {unknown}, but the inputs of the model are {names}")
    pairs = zip(names, example, strict=True)
    return [counted(name, dynamic.get(name, {}), x) for name, x in pairs]


def without(open_: Sequence[Axes], program: Program, fixed: Collection[str]) -> list[Axes]:
    """`open_` without the axes that have a dimension of `program` in `fixed`, and their kin."""
    pairs = list(zip(open_, program.io.ports, strict=True))
    names = {
        name
        for axes, port in pairs
        for axis, name in axes.items()
        if port.is_tensor and port.shape[axis] in fixed
    }
    return [{axis: n for axis, n in axes.items() if n not in names} for axes in open_]


def metadata_of(model: ir.Model) -> dict[str, str]:
    """What the file says about itself, without what an export of ours added to it."""
    return {k: v for k, v in model.metadata_props.items() if not k.startswith("qcompiler.")}


def _check_equal(model: ir.Model, example: Sequence[Tensor], declared: Sequence[Axes]) -> None:
    first: dict[str, tuple[str, int]] = {}
    for value, x, axes in zip(model_inputs(model), example, declared, strict=True):
        for axis, name in axes.items():
            other, size = first.setdefault(name, (str(value.name), x.shape[axis]))
            if size != x.shape[axis]:
                raise BadInput(
                    f"the dimension {name!r} is {size} in the example of {other!r} and "
                    f"{x.shape[axis]} in that of {value.name!r}; expected one size"
                )


def _declared(model: ir.Model, example: Sequence[Tensor]) -> list[Axes]:
    found = []
    for value, x in zip(model_inputs(model), example, strict=True):
        axes: Axes = {}
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int):
                axes[axis] = dim.value or f"{value.name}.{axis}"
        shape = None if value.shape is None else [d for d in value.shape]
        fits = shape is None or (
            len(shape) == x.ndim
            and all(d == n for d, n in zip(shape, x.shape, strict=True) if isinstance(d, int))
        )
        if not fits:
            raise BadInput(
                f"input {value.name!r} has shape {[str(d) for d in value.shape or ()]} in the file;"
                f" the example has {list(x.shape)}"
            )
        found.append(axes)
    return found


def named_ports(
    program: Program, names: list[str], open_: Sequence[Axes], baked: Mapping[str, np.ndarray]
) -> Program:
    """`program` with the file's names of inputs and dimensions; baked inputs are constants."""
    io = program.io
    new: dict[str, str] = {}
    for port, axes in zip(io.ports, open_, strict=True):
        for axis, dim in enumerate(port.shape):
            wanted = axes.get(axis)
            if isinstance(dim, str) and wanted and wanted not in new.values():
                new.setdefault(dim, wanted)

    def rename(port: Port, name: str) -> Port:
        if name in baked:
            return Port(name, constant=baked[name].tolist())
        shape = tuple(new.get(d, d) if isinstance(d, str) else d for d in port.shape)
        return replace(port, name=name, shape=shape)

    ports = tuple(rename(p, n) for p, n in zip(io.ports, names, strict=True))
    dims = {new.get(d, d): bounds for d, bounds in io.dims.items()}
    return replace(program, io=replace(io, ports=ports, dims=dims, names=tuple(names)))
