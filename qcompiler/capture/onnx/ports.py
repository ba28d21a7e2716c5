"""The outside of a program from a file: inputs and dynamic dimensions under the file's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from torch import Tensor

from qcompiler.capture.onnx.interpret import model_inputs
from qcompiler.errors import BadInput
from qcompiler.io import Port
from qcompiler.program import Program

Axes = dict[int, str]
"""Axis → name of the dimension that the file leaves open there."""


def declared(model: ir.Model, example: Sequence[Tensor]) -> list[Axes]:
    """The open axes of each input. The example must fit what the file says of types and sizes."""
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
