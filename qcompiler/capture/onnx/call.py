"""What an operator of the table sees: one node of the file, with its values and attributes.

A value is a tensor, or *known*: a small array of numbers that follow from the file and from the
sizes of the inputs alone. Shape arithmetic (Shape, Gather, Concat, …) stays known, as Python
numbers and symbolic sizes, so that a dynamic dimension goes through it and no shape is baked in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.capture.onnx.types import onnx_type, to_tensor, torch_dtype
from qcompiler.errors import BadInput

Array = np.ndarray
Size = int
"""An integer, or a symbolic size (`torch.SymInt`), which does all that an integer does."""
Number = float
EXACT = {
    float(np.float32(v)): v
    for v in (math.sqrt(2), math.sqrt(0.5), math.sqrt(2 / math.pi), 0.044715, 1 / 6)
}
"""Constants of GELU and its kin as a float32 holds them → what they stand for. In float32 nothing
changes; in float64, where exactness is checked, they are what the equations say."""
FOLDED = 1024
"""Elements above which an array is computed with torch, not as part of the shapes."""


class NeedsValue(Exception):
    """An operator needs numbers at capture that come from these inputs of the model."""

    def __init__(self, inputs: frozenset[str], error: BadInput) -> None:
        self.inputs = inputs
        self.error = error


@dataclass(eq=False)
class Value:
    """One value of the graph while it is traced."""

    make: Callable[[], Tensor] | None = None
    """Gives the tensor; None for a value that is known and was not asked for as a tensor yet."""
    read: Callable[[], Array] | None = None
    """Gives the numbers, if they are known; an object array when some are symbolic."""
    type: ir.DataType | None = None
    """The type in the file, where it says more than torch's (int4 is held as int8)."""
    sources: frozenset[str] = frozenset()
    """Inputs of the model that it depends on."""
    size: int | None = None
    """Number of elements of a known value."""
    _tensor: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(cls, result: Tensor | Array, sources: frozenset[str] = frozenset()) -> Value:
        if isinstance(result, Tensor):
            return cls(lambda: result, sources=sources)
        return cls(read=lambda: result, size=result.size, sources=sources)

    @property
    def known(self) -> Array | None:
        return self.read() if self.read is not None else None

    @property
    def folds(self) -> bool:
        """Whether arithmetic with it belongs to the shapes: few integers, or one number."""
        if self.read is None or self.size is None or self.size > FOLDED:
            return False
        kind = self.read().dtype
        return self.size == 1 or kind.kind == "O" or kind in (np.int64, np.int32, np.bool_)

    @property
    def tensor(self) -> Tensor:
        if self._tensor is None:
            if self.make is None:
                assert self.read is not None
                self._tensor = to_tensor(self.read())
            else:
                self._tensor = self.make()
        return self._tensor


@dataclass(eq=False)
class Call:
    """One node. `values` are its inputs, None where an optional one is left out."""

    node: ir.Node
    version: int
    """Version of the operator set that the file asks for in this node's domain."""
    values: Sequence[Value | None]

    @property
    def name(self) -> str:
        return name_of(self.node)

    # --- attributes ----------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        return name in self.node.attributes

    def get(self, name: str, default: object = None) -> object:
        """The value of an attribute, of whatever type."""
        return self.node.attributes[name].value if name in self.node.attributes else default

    def int(self, name: str, default: Size | None = None) -> Size:
        value = self._attribute(name, default, "an integer")
        return value if isinstance(value, int) else self._wrong(name, "an integer", value)

    def float(self, name: str, default: Number | None = None) -> Number:
        value = self._attribute(name, default, "a number")
        if not isinstance(value, int | float):
            self._wrong(name, "a number", value)
        return float(value)

    def text(self, name: str, default: str | None = None) -> str:
        value = self._attribute(name, default, "a text")
        return value if isinstance(value, str) else self._wrong(name, "a text", value)

    def ints(self, name: str, default: Sequence[Size] | None = None) -> list[Size]:
        value = self._attribute(name, default, "integers")
        ok = isinstance(value, Sequence) and all(isinstance(v, int) for v in value)
        return list(value) if ok else self._wrong(name, "integers", value)  # type: ignore

    def floats(self, name: str, default: Sequence[Number] | None = None) -> list[Number]:
        value = self._attribute(name, default, "numbers")
        if not isinstance(value, Sequence) or not all(isinstance(v, int | float) for v in value):
            self._wrong(name, "numbers", value)
        return [float(v) for v in value]

    def texts(self, name: str, default: Sequence[str] | None = None) -> list[str]:
        value = self._attribute(name, default, "texts")
        if not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
            self._wrong(name, "texts", value)
        return list(value)

    def dtype(self, name: str, default: torch.dtype | None = None) -> torch.dtype:
        """An attribute that holds an ONNX element type, as torch's type."""
        if default is not None and not self.has(name):
            return default
        try:
            return torch_dtype(ir.DataType(self.int(name)))
        except BadInput as error:
            raise self.refusal(str(error)) from None

    def _attribute(self, name: str, default: object, what: str) -> object:
        if name not in self.node.attributes and default is None:
            raise self.refusal(f"lacks the attribute {name!r} ({what})")
        return self.get(name, default)

    def _wrong(self, name: str, expected: str, found: object) -> NoReturn:
        raise self.refusal(f"attribute {name!r} is {found!r}; expected {expected}")

    # --- inputs --------------------------------------------------------------------------------

    def given(self, index: Size) -> bool:
        """Whether the input is there: optional ones may be left out, at the end or by no name."""
        return index < len(self.values) and self.values[index] is not None

    def value(self, index: Size) -> Value:
        value = self.values[index] if index < len(self.values) else None
        if value is None:
            raise self.refusal(f"lacks its input {index}")
        return value

    def tensor(self, index: Size) -> Tensor:
        return self.value(index).tensor

    def operand(self, index: Size, rank: Size | None = None) -> Tensor | Number:
        """The input as a Python number where it is one that is known, else as a tensor.

        With numbers, graphs read `x * 0.5` and rules match them. `rank` is that of the other
        operand: a number of higher rank would change the shape of the result.
        """
        value = self.value(index)
        known = value.known if value.size == 1 else None
        if known is None or known.dtype == np.bool_ or (rank is not None and known.ndim > rank):
            return value.tensor
        if known.dtype.kind not in "iufO":  # a type that numpy has from an extension
            return value.tensor
        number: Number = known.reshape(-1)[0].item() if known.dtype != object else known.flat[0]
        return EXACT.get(number, number) if known.dtype == np.float32 else number

    def known(self, index: Size) -> Array:
        """The numbers of an input that must be known at capture."""
        value = self.value(index)
        if value.known is not None:
            return value.known
        error = self.refusal(
            f"its input {index} ({self.input_name(index)!r}) must be known when the model is "
            "captured, and depends on the values of "
            + (f"the input {', '.join(sorted(value.sources))}" if value.sources else "a tensor")
            + "; expected a constant, or arithmetic on shapes"
        )
        if value.sources:
            raise NeedsValue(value.sources, error)
        raise error

    def sizes(self, index: Size) -> list[Size]:
        """A known input as a list of integers and symbolic sizes."""
        return [_size(v) for v in self.known(index).reshape(-1)]

    def whole(self, index: Size) -> list[Size]:
        """A known input as a list of integers that depend on no size."""
        found = self.sizes(index)
        if all(isinstance(v, int) for v in found):
            return found
        raise self.refusal(f"its input {index} depends on a dynamic size; expected fixed integers")

    def number(self, index: Size) -> Number:
        """A known input of one element, as a Python number."""
        known = self.known(index)
        if known.size != 1:
            raise self.refusal(f"its input {index} has {known.size} elements; expected one")
        value = known.reshape(-1)[0]
        return value if known.dtype == object else value.item()  # type: ignore[no-any-return]

    def input_name(self, index: Size) -> str:
        value = self.node.inputs[index]
        return str(value.name) if value is not None else ""

    def type(self, index: Size) -> ir.DataType:
        """Element type in the file; where it does not say, that of the tensor."""
        value = self.node.inputs[index]
        type = self.value(index).type or (value.dtype if value is not None else None)
        return type or onnx_type(self.tensor(index).dtype)

    def refusal(self, why: str) -> BadInput:
        """The error for this node: which it is, and `why` it cannot be captured."""
        return BadInput(f"node {self.name!r} ({self.node.op_type}): {why}")


def _size(value: object) -> Size:
    return value if isinstance(value, torch.SymInt) else int(value)  # type: ignore


def name_of(node: ir.Node) -> str:
    """The node's own name, or one made of its operator and what it yields."""
    return node.name or f"{node.op_type}_{node.outputs[0].name if node.outputs else ''}"
