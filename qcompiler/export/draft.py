"""A private copy of a program's graph on its way to ONNX: what a dialect edits.

The graph stays one of torch functions, with parameters as placeholders in front: it is traced once
more for the export, and every node keeps the id that it has in the program.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.fx.node import Argument, map_aggregate

from qcompiler.edit import copy_graph
from qcompiler.export.weights import Weight
from qcompiler.formats import QFormat
from qcompiler.formats.element import Half
from qcompiler.ops import dequantize_packed
from qcompiler.program import Program, node_id

qc = torch.ops.qc
OLDEST = 18
"""The opset that torch's exporter writes."""


class Draft:
    """The graph, and what its placeholders will hold in the file."""

    def __init__(self, program: Program, opset: int = OLDEST) -> None:
        self.graph, _ = copy_graph(program.graph)
        self.tensors = {slot: program.params[name] for slot, name in program.slots.items()}
        """Name of a placeholder → what it holds in the ONNX file."""
        self.names = dict(program.slots)
        """Name of a placeholder → what it is called in the ONNX file."""
        self.nibbles: dict[str, bool] = {}
        """Placeholders of 4 bit numbers → whether these are signed; torch has no such type."""
        self.kernels: dict[str, str] = {}
        """Site id → kernel."""
        # Before it, most operators take no bfloat16.
        halves = any(t.dtype == torch.bfloat16 for t in program.params.values())
        self.opset = max(opset, 22) if halves else opset
        self._constants: dict[str, fx.Node] = {}
        self._decode_side_data()

    def _decode_side_data(self) -> None:
        """Scales and zero points are few: those that are stored as codes become numbers."""
        for node in list(self.graph.nodes):
            if node.target is not qc.dequantize.default or not _is_side_data(node):
                continue
            data, scale, zero = map(self.param, node.args[:3])
            if data is not None:
                value = dequantize_packed(data, scale, zero, *node.args[3:])
                node.replace_all_uses_with(self.constant(node_id(node), value))

    def param(self, node: object) -> Tensor | None:
        """What the placeholder `node` holds; None for anything else."""
        return self.tensors.get(node.name) if isinstance(node, fx.Node) else None

    def weight(self, node: fx.Node) -> Weight | None:
        """The stored weight that `node` makes floats of; None if it makes none of parameters."""
        if node.target is not qc.dequantize.default or not isinstance(node.args[0], fx.Node):
            return None
        fmt = QFormat.parse(str(node.args[3]))
        if not fmt.is_integer or fmt.bits > 8:
            return None
        data, scale, zero = map(self.param, node.args[:3])
        if data is None or scale is None or (zero is None and node.args[2] is not None):
            return None
        if zero is not None and zero.is_floating_point():
            return None
        name = self.names[node.args[0].name].removesuffix(".data")
        return Weight.of(node, name, data, scale, zero)

    def halves(self, node: fx.Node) -> fx.Node | None:
        """The parameter of a 16-bit floating point type that `node` decodes, if it does."""
        kind, data = QFormat.parse(str(node.args[3])).kind, self.param(node.args[0])
        if not isinstance(kind, Half) or data is None or node.args[1] is not None:
            return None
        assert isinstance(node.args[0], fx.Node)
        return self.constant(self.names[node.args[0].name], data.view(kind.dtype))

    def constant(self, name: str, value: Tensor | None) -> fx.Node | None:
        """A placeholder for `value`, one for each name; None stays None."""
        if value is None:
            return None
        if name not in self._constants:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                text = "".join(c if c.isalnum() else "_" for c in name)
                node = self.graph.placeholder(f"c_{text}")
            self.tensors[node.name] = value
            self.names[node.name] = name
            self._constants[name] = node
        return self._constants[name]

    def stored(
        self, weight: Weight, transpose: bool = False, shape: tuple[int, ...] | None = None
    ) -> tuple[Argument, ...]:
        """A weight for `kernels.dequantize_linear`: data, scale, zero point, axis, block size.

        The data are (N, K), or (K, N), or in `shape`; scales are (N,), or one for each block of K.
        """
        data, scale, zero = weight.data, weight.scale, weight.zero
        blocked = scale.shape[1] > 1
        if blocked:
            self.opset = max(self.opset, 21)
        else:
            scale, zero = scale[:, 0], _zeros(weight) if zero is None else zero[:, 0]
        name = f"{weight.name}.rows"
        if transpose:
            name = f"{weight.name}.columns"
            data, scale, zero = data.t(), scale.t(), None if zero is None else zero.t()
        elif shape is not None:
            name = f"{weight.name}.kernel"
            data = data.reshape(shape)
        return (
            self.integers(name, data, weight),
            self.constant(f"{name}.scale", scale.contiguous()),
            self.integers(f"{name}.zero", zero, weight),
            int(blocked != transpose),
            weight.group if blocked else None,
        )

    def integers(self, name: str, value: Tensor | None, weight: Weight) -> fx.Node | None:
        """A constant of integers of `weight`'s format, in 4 bits each where they fit."""
        node = self.constant(name, None if value is None else value.to(weight.dtype).contiguous())
        if node is not None and weight.nibbles:
            self.nibbles[node.name] = weight.format.signed
            self.opset = max(self.opset, 21)
        return node

    def call(self, at: fx.Node, function: Callable[..., object], *args: Argument) -> fx.Node:
        """A call in front of `at`, under the id of `at`."""
        with self.graph.inserting_before(at):
            node = self.graph.call_function(function, args)
        node.meta["custom"] = at.meta["custom"]
        return node

    def swap(self, old: fx.Node, function: Callable[..., object], *args: Argument) -> None:
        """Let a call stand for `old`."""
        new = self.call(old, function, *args)
        new.meta["val"] = old.meta["val"]
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def finish(self, float32: bool) -> None:
        """Drop what nobody reads; compute in float32 where the target knows no other type."""
        self.graph.eliminate_dead_code()
        for node in list(self.graph.nodes):
            if node.name in self.tensors and not node.users:
                self.graph.erase_node(node)
                del self.tensors[node.name]
                continue
            if float32:
                node.args = map_aggregate(node.args, _as_float32)
                node.kwargs = map_aggregate(node.kwargs, _as_float32)
            node.meta = {"custom": {"id": node_id(node)}} if "custom" in node.meta else {}
        self.nibbles = {n: signed for n, signed in self.nibbles.items() if n in self.tensors}
        if float32:
            self.tensors = {
                n: t.float() if t.is_floating_point() else t for n, t in self.tensors.items()
            }


def _is_side_data(node: fx.Node) -> bool:
    """Whether `node` is read by what decodes other codes, and by nothing else."""
    return all(u.target is qc.dequantize.default and node in u.args[1:3] for u in node.users)


def _as_float32(value: Argument) -> Argument:
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float32
    return value


def _zeros(weight: Weight) -> Tensor | None:
    """Zero points of zero, written out: ONNX Runtime, when it turns int8 weights into uint8, would
    otherwise add a single one for many scales, and fail at the first run."""
    return None if weight.nibbles else torch.zeros(len(weight.data), dtype=torch.int16)
