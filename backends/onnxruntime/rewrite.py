"""From a quantized program to a graph of the functions in `kernels.py`.

The graph stays one of torch functions, with parameters as placeholders in front: it is traced once
more for the export, and every node keeps the id that it has in the program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.fx.node import Argument, map_aggregate

from qcompiler.backends.onnxruntime import capabilities as names
from qcompiler.backends.onnxruntime import kernels
from qcompiler.backends.onnxruntime.layout import (
    Weight,
    block_of,
    container,
    pack_fields,
    planes,
    unsigned,
)
from qcompiler.edit import copy_graph
from qcompiler.formats import QFormat, Scheme
from qcompiler.ops import fake_quantize, hadamard_transform, rope
from qcompiler.program import Program, node_id
from qcompiler.sites import Site, sites

aten = torch.ops.aten
qc = torch.ops.qc


class Rewriter:
    """A private copy of the program's graph, rewritten when it is made."""

    def __init__(self, program: Program) -> None:
        self.graph, _ = copy_graph(program.graph)
        self.tensors = {slot: program.params[name] for slot, name in program.slots.items()}
        """Name of a placeholder → what it holds in the ONNX file."""
        self.nibbles: dict[str, bool] = {}
        """Placeholders of 4 bit numbers → whether these are signed; torch has no such type."""
        self.kernels: dict[str, str] = {}
        """Site id → kernel."""
        self._slots = program.slots
        self._constants: dict[str, fx.Node] = {}
        self._tokens: dict[fx.Node, fx.Node] = {}
        for site in sites(list(self.graph.nodes)):
            self._site(site)
        for node in list(self.graph.nodes):
            if node.target is qc.fake_quantize.default:
                self._fake_quantize(node)
            elif node.target is qc.dequantize.default and node.users:
                self._dequantize(node)
            elif node.target is qc.rope.default:
                node.target = rope
            elif node.target is qc.hadamard.default:
                node.target = hadamard_transform
            elif node.target is qc.sparse_linear.default:
                self._sparse_linear(node)
        self._clean()

    # --- sites ---------------------------------------------------------------------------------

    def _site(self, site: Site) -> None:
        weight = self._weight(site.weight)
        if weight is None:
            return
        found = names.kernel_of(site, Scheme(weight.format, _format(site.x)))
        if found is None:
            return
        kernel = found.kernel
        if kernel == names.CONV_QDQ and not _requantized(site.node):
            kernel = names.CONV
        self.kernels[site.id] = kernel
        makers: dict[str, Callable[[Site, Weight], None]] = {
            names.INTEGER: self._integer,
            names.QDQ: self._qdq,
            names.CONV_QDQ: self._qdq_conv,
            names.NBITS: self._nbits,
            names.TWO_NBITS: self._nbits,
            names.GATHER: self._gather,
        }
        if make := makers.get(kernel):
            make(site, weight)

    def _weight(self, node: fx.Node) -> Weight | None:
        """The stored weight that `node` is, seen through the reshape of a convolution's kernel."""
        if node.target is aten.reshape.default and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        if node.target is not qc.dequantize.default:
            return None
        data, scale, zero = (
            self.tensors[n.name] if isinstance(n, fx.Node) else None for n in node.args[:3]
        )
        assert isinstance(node.args[0], fx.Node) and data is not None and scale is not None
        name = self._slots[node.args[0].name].removesuffix(".data")
        return Weight.of(node, name, data, scale, zero)

    def _integer(self, site: Site, weight: Weight) -> None:
        source, fmt = site.x, _format(site.x)
        assert source is not None and fmt is not None
        zero = self._constant("zero_128", torch.tensor(128, dtype=torch.uint8))
        if source not in self._tokens:
            one = self._constant("one", torch.tensor(1.0))
            self._tokens[source] = self._call(
                source,
                kernels.quantize_tokens,
                source.args[0],
                _axes(fmt, source),
                fmt.qmax,
                one,
                zero,
            )
        rows = self._rows(weight, transpose=True)
        self._swap(site.node, kernels.integer_linear, self._tokens[source], zero, *rows, site.bias)

    def _qdq(self, site: Site, weight: Weight) -> None:
        rows = self._rows(_with_zero(weight), transpose=True)
        self._swap(site.node, kernels.qdq_linear, site.x, *rows, site.bias)

    def _qdq_conv(self, site: Site, weight: Weight) -> None:
        rows = self._rows(_with_zero(weight), shape=tuple(site.weight.meta["val"].shape))
        new = self._call(site.node, kernels.dequantize_linear, *rows)
        site.node.update_arg(site.kind.weight, new)

    def _nbits(self, site: Site, weight: Weight) -> None:
        block = block_of(weight.format, weight.data.shape[1])
        assert block is not None
        stored = [
            tuple(
                self._constant(f"{weight.name}.plane{i}.{part}", t)
                for part, t in (("data", p.data), ("scale", p.scale), ("zero", p.zero))
            )
            for i, p in enumerate(planes(weight, block))
        ]
        bits = min(container(weight.format.bits), 4)
        self._swap(site.node, kernels.nbits_linear, site.x, stored, site.bias, bits, block)

    def _gather(self, site: Site, weight: Weight) -> None:
        bits = container(weight.format.bits)
        fields, zero = unsigned(weight)
        self._swap(
            site.node,
            kernels.gather_rows,
            site.node.args[1],
            self._constant(f"{weight.name}.table", pack_fields(fields, bits)),
            self._constant(f"{weight.name}.table_scale", weight.scale),
            self._constant(f"{weight.name}.table_zero", zero),
            self._group(weight),
            weight.data.shape[1],
            bits,
        )

    # --- what belongs to no kernel -------------------------------------------------------------

    def _fake_quantize(self, node: fx.Node) -> None:
        x, _, scale, zero = [*node.args, None, None][:4]
        fmt = _format(node)
        assert isinstance(x, fx.Node) and fmt is not None
        if isinstance(scale, fx.Node) and fmt.block is None and scale.name in self.tensors:
            offset = 128 if fmt.signed else 0
            if fmt.symmetric and _non_negative(x):
                offset = 0  # the same numbers, and a Relu in front becomes part of the rounding
            middle = offset + (int(self.tensors[zero.name]) if isinstance(zero, fx.Node) else 0)
            self._swap(
                node,
                kernels.quantize_static,
                x,
                self._constant(self._slots[scale.name], self.tensors[scale.name].reshape(())),
                self._constant(f"zero_{middle}", torch.tensor(middle, dtype=torch.uint8)),
                max(fmt.qmin + offset, 0),
                fmt.qmax + offset,
            )
        elif scale is None and fmt.symmetric and not fmt.full and (axes := _axes(fmt, x)):
            self._swap(node, kernels.quantize_dynamic, x, axes, fmt.qmax)
        else:
            node.target = fake_quantize

    def _dequantize(self, node: fx.Node) -> None:
        weight = self._weight(node)
        assert weight is not None
        zero = None if weight.zero is None else weight.zero.to(weight.dtype)
        data = self._constant(f"{weight.name}.data", weight.data.to(weight.dtype))
        zeros = self._constant(f"{weight.name}.zero", zero)
        scale = self._constant(f"{weight.name}.scale", weight.scale)
        if weight.format.bits <= 4:
            self.nibbles |= {n.name: weight.format.signed for n in (data, zeros) if n is not None}
        self._swap(node, kernels.dequantize, data, scale, zeros, self._group(weight))

    def _sparse_linear(self, node: fx.Node) -> None:
        """ONNX has no sparse product: the entries are laid out in a matrix when it is loaded."""
        x, values, columns, rows = node.args
        assert isinstance(x, fx.Node) and isinstance(columns, fx.Node) and isinstance(rows, fx.Node)
        starts, width = self.tensors[rows.name].long(), int(x.meta["val"].shape[-1])
        row_of = torch.arange(len(starts) - 1).repeat_interleave(starts.diff())
        places = (row_of * width + self.tensors[columns.name]).to(torch.int32)
        at = self._constant(f"{self._slots[columns.name]}.places", places)
        self._swap(node, _scattered_linear, x, values, at, len(starts) - 1)

    # --- parts ---------------------------------------------------------------------------------

    def _rows(
        self, weight: Weight, transpose: bool = False, shape: tuple[int, ...] | None = None
    ) -> tuple[fx.Node | None, ...]:
        """Data (N, K), or (K, N), or in `shape`; scale and zero point (N,)."""
        data = weight.data.to(weight.dtype)
        data = data.T.contiguous() if transpose else data.reshape(shape or data.shape)
        zero = None if weight.zero is None else weight.zero[:, 0].to(weight.dtype).contiguous()
        return (
            self._constant(f"{weight.name}.rows", data),
            self._constant(f"{weight.name}.row_scale", weight.scale[:, 0].contiguous()),
            self._constant(f"{weight.name}.row_zero", zero),
        )

    def _group(self, weight: Weight) -> fx.Node | None:
        """The number of each column's scale; None for one scale in a row."""
        if weight.scale.shape[1] == 1:
            return None
        width = weight.data.shape[1]
        numbers = torch.arange(width) // weight.group
        return self._constant(f"group_{width}_{weight.group}", numbers)

    def _constant(self, name: str, value: Tensor | None) -> fx.Node | None:
        """A placeholder for `value`, one for each name; None stays None."""
        if value is None:
            return None
        if name not in self._constants:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                text = "".join(c if c.isalnum() else "_" for c in name)
                node = self.graph.placeholder(f"c_{text}")
            self.tensors[node.name] = value
            self._constants[name] = node
        return self._constants[name]

    def _call(self, at: fx.Node, function: Callable[..., object], *args: Argument) -> fx.Node:
        """A call in front of `at`, under the id of `at`."""
        with self.graph.inserting_before(at):
            node = self.graph.call_function(function, args)
        node.meta["custom"] = at.meta["custom"]
        return node

    def _swap(self, old: fx.Node, function: Callable[..., object], *args: Argument) -> None:
        new = self._call(old, function, *args)
        new.meta["val"] = old.meta["val"]
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def _clean(self) -> None:
        """Drop what nobody reads, and compute in float32: ONNX Runtime has kernels for no other."""
        self.graph.eliminate_dead_code()
        for node in list(self.graph.nodes):
            if node.name in self.tensors and not node.users:
                self.graph.erase_node(node)
                del self.tensors[node.name]
                continue
            node.args = map_aggregate(node.args, _as_float32)
            node.kwargs = map_aggregate(node.kwargs, _as_float32)
            node.meta = {"custom": {"id": node_id(node)}} if "custom" in node.meta else {}
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor.float() if tensor.is_floating_point() else tensor


def _scattered_linear(x: Tensor, values: Tensor, places: Tensor, rows: int) -> Tensor:
    """x Sᵀ, with `values` at flat `places` of S (rows, in)."""
    flat = x.new_zeros(rows * x.shape[-1]).scatter(0, places.long(), values)
    return torch.nn.functional.linear(x, flat.reshape(rows, x.shape[-1]))


def _as_float32(value: Argument) -> Argument:
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float32
    return value


def _format(node: fx.Node | None) -> QFormat | None:
    """The format to which `node` rounds, if it does."""
    if node is None or node.target is not qc.fake_quantize.default:
        return None
    return QFormat.parse(str(node.args[1]))


def _with_zero(weight: Weight) -> Weight:
    """Zero points written out where they are zeros: ONNX Runtime, when it turns int8 weights into
    uint8, otherwise adds a single one for many scales, and fails at the first run."""
    zero = torch.zeros_like(weight.scale, dtype=torch.int16)
    return weight if weight.zero is not None else replace(weight, zero=zero)


def _axes(fmt: QFormat, node: fx.Node) -> tuple[int, ...]:
    """The trailing axes that share a scale; empty if a scale is for a part of an axis."""
    rank = node.meta["val"].ndim
    block = (-1,) * rank if fmt.block is None else fmt.block[-rank:]
    return tuple(range(-len(block), 0)) if set(block) == {-1} else ()


def _requantized(node: fx.Node) -> bool:
    """Whether nothing but one static format reads `node`, maybe behind a Relu."""
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.relu.default:
        users = list(users[0].users)
    fmt = _format(users[0]) if len(users) == 1 else None
    return fmt is not None and fmt.block is None and not fmt.dynamic


def _non_negative(node: fx.Node) -> bool:
    """Whether `node` yields no negative number, seen through what only moves numbers."""
    moves = (aten.max_pool2d.default, aten.reshape.default, aten.flatten.using_ints)
    while node.target in moves and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.target is aten.relu.default
