"""Example inputs for a file that comes without: of the declared types and sizes, in range."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.capture.onnx.interpret import model_inputs
from qcompiler.capture.onnx.limits import check_size
from qcompiler.capture.onnx.types import torch_dtype
from qcompiler.errors import BadInput

SIZES = (3, 11, 5, 7, 13, 9)
"""Sizes of dynamic dimensions, each its own, so that none are taken for equal by accident."""
PIXELS = 64
MOVES = {"Cast", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Flatten", "Identity", "Expand"}


def example_inputs(model: ir.Model) -> tuple[Tensor, ...]:
    """One tensor for each input; integers that are looked up in a table stay inside it."""
    generator = torch.Generator().manual_seed(0)
    sizes: dict[str, int] = {}
    held, planned = 0, []
    for value in model_inputs(model):
        shape, dtype = _shape(value, sizes), _dtype(value)
        held = check_size(f"the input {value.name!r}", shape, dtype, held)
        planned.append((value, shape, dtype))
    return tuple(_draw(*plan, generator) for plan in planned)


def _shape(value: ir.Value, sizes: dict[str, int]) -> list[int]:
    if value.shape is None:
        raise BadInput(
            f"input {value.name!r} says no shape; hand over example_inputs for this model"
        )
    image = len(value.shape) == 4 and value.dtype is not None and value.dtype.is_floating_point()
    found = []
    for axis, dim in enumerate(value.shape):
        if isinstance(dim, int):
            if dim < 0:
                raise BadInput(f"input {value.name!r} has size {dim} in axis {axis}; an open size "
                               "has a name, or none")  # fmt: skip
            found.append(dim)
            continue
        name = dim.value or f"{value.name}.{axis}"
        if image and axis > 1 and name not in sizes:
            sizes[name] = PIXELS
        found.append(_size(name, sizes))
    return found


def _size(name: str, sizes: dict[str, int]) -> int:
    """The size of a named dimension; a name such as `past + 1` is the sum of its terms."""
    terms = [t.strip() for t in name.split("+")]
    if len(terms) > 1:
        return sum(int(t) if t.isdigit() else _size(t, sizes) for t in terms)
    return sizes.setdefault(name, SIZES[len(sizes) % len(SIZES)])


def _dtype(value: ir.Value) -> torch.dtype:
    if value.dtype is None:
        raise BadInput(f"input {value.name!r} says no element type; hand over example_inputs")
    try:
        return torch_dtype(value.dtype)
    except BadInput as error:
        raise BadInput(f"input {value.name!r}: {error}") from None


def _draw(
    value: ir.Value, shape: list[int], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    high = _bound(value)
    drawn = torch.randint(0, high + 1, shape, generator=generator)
    if drawn.numel():  # both ends, from which random inputs for checks are drawn
        drawn.view(-1)[0], drawn.view(-1)[-1] = 0, high
    return drawn.to(dtype)


def _bound(value: ir.Value) -> int:
    """The largest integer that every table takes which `value` indexes; 1 for a mask."""
    bounds, todo, seen = [], [value], {value}
    while todo:
        for node, index in todo.pop().uses():
            table = node.inputs[0]
            if node.op_type == "Gather" and index == 1 and table is not None:
                rows = table.shape[node.attributes.get_int("axis", 0)] if table.shape else None
                bounds += [rows - 1] if isinstance(rows, int) else []
            if node.op_type in MOVES and index == 0 and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                todo.append(node.outputs[0])
    return min(bounds, default=1)
