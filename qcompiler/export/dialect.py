"""What a program becomes in standard ONNX operators, and what a target may change of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompiler import ops
from qcompiler.errors import BackendError
from qcompiler.export import kernels
from qcompiler.export.draft import OLDEST, Draft
from qcompiler.export.weights import Weight, as_unsigned, container, pack_fields, unsigned
from qcompiler.formats import QFormat
from qcompiler.formats.element import Half
from qcompiler.formats.minifloat import Minifloat
from qcompiler.program import Program, node_id
from qcompiler.sites import Site, sites

aten = torch.ops.aten
qc = torch.ops.qc


class Dialect:
    """Standard operators. A target that reads others overrides methods."""

    name: ClassVar[str] = "onnx"
    opset: ClassVar[int] = OLDEST
    """The lowest opset; formats may need a later one."""
    float32: ClassVar[bool] = False
    """Whether everything is computed in float32, for a runtime that has kernels for no other."""

    def __init__(self, unsigned: bool = False) -> None:
        """`unsigned`: write int8 weights as uint8 with zero point 128. No runtime then adds
        products in pairs in 16 bits, which saturates on CPUs without VNNI."""
        self._unsigned = unsigned

    def lower(self, program: Program) -> Draft:
        """The program in functions that the exporter can write."""
        draft = Draft(program, self.opset)
        for site in sites(list(draft.graph.nodes)):
            self.site(draft, site)
        rules: dict[object, Callable[[Draft, fx.Node], None]] = {
            qc.dequantize.default: self.dequantize,
            qc.lookup.default: _plain(ops.lookup),
            qc.fake_quantize.default: self.fake_quantize,
            qc.quantize.default: self.quantize,
            qc.dequantize_integers.default: _plain(kernels.dequantize_integers),
            qc.dynamic_scale.default: _plain(ops.dynamic_scale),
            qc.rope.default: _plain(ops.rope),
            qc.hadamard.default: _plain(ops.hadamard_transform),
            qc.sparse_linear.default: self.sparse_linear,
            aten.scaled_dot_product_attention.default: _plain(kernels.attention),
            aten.sort.stable: _plain(kernels.sort),
            aten.adaptive_avg_pool1d.default: _adaptive_mean,
            aten.adaptive_avg_pool2d.default: _adaptive_mean,
            aten.adaptive_avg_pool3d.default: _adaptive_mean,
        }
        for node in list(draft.graph.nodes):
            if node.target in rules and node.users:
                rules[node.target](draft, node)
        draft.finish(self.float32)
        return draft

    # --- sites ---------------------------------------------------------------------------------

    def site(self, draft: Draft, site: Site) -> None:
        """Put in a kernel for a site whose weight is stored in integers."""
        weight = self.weight(draft, site.weight)
        if weight is None:
            return
        if site.kind.name == "embedding":
            self.gather(draft, site, weight)
        elif site.kind.name == "linear" and _even(weight):
            parts = draft.stored(weight, transpose=True)
            draft.kernels[site.id] = "MatMul"
            draft.swap(site.node, kernels.linear, site.x, *parts, site.bias)
        elif site.kind.name == "conv" and weight.scale.shape[1] == 1:
            self.conv(draft, site, weight)

    def weight(self, draft: Draft, node: fx.Node) -> Weight | None:
        """The stored weight that `node` is, seen through the reshape of a convolution's kernel."""
        if node.target is aten.reshape.default and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        weight = draft.weight(node)
        return as_unsigned(weight) if weight is not None and self._unsigned else weight

    def conv(self, draft: Draft, site: Site, weight: Weight) -> None:
        """A convolution whose weight is dequantized in its own shape, which runtimes fuse."""
        value = site.weight.meta["val"]
        parts = draft.stored(weight, shape=tuple(value.shape))
        new = draft.call(site.node, kernels.stored, *parts, None, value.dtype)
        site.node.update_arg(site.kind.weight, new)
        draft.kernels[site.id] = "Conv"

    def gather(self, draft: Draft, site: Site, weight: Weight) -> None:
        """An embedding that dequantizes the rows that it reads."""
        bits = container(weight.format.bits)
        fields, zero = unsigned(weight)
        draft.kernels[site.id] = "Gather"
        draft.swap(
            site.node,
            kernels.gather_rows,
            site.node.args[1],
            draft.constant(f"{weight.name}.table", pack_fields(fields, bits)),
            draft.constant(f"{weight.name}.table_scale", weight.scale),
            draft.constant(f"{weight.name}.table_zero", zero),
            _groups(draft, weight),
            weight.data.shape[1],
            bits,
            site.node.meta["val"].dtype,
        )

    # --- operators -----------------------------------------------------------------------------

    def dequantize(self, draft: Draft, node: fx.Node) -> None:
        """A weight that no kernel reads as it is stored."""
        weight = self.weight(draft, node)
        value = node.meta["val"]
        if weight is not None and _even(weight):
            shape = None if value.ndim == 2 else tuple(value.shape)
            draft.swap(node, kernels.stored, *draft.stored(weight), shape, value.dtype)
        else:
            self.dequantize_plainly(draft, node, weight)

    def dequantize_plainly(self, draft: Draft, node: fx.Node, weight: Weight | None) -> None:
        """The same in Cast, Sub and Mul, for a last group that is short; other formats as their
        operator computes them, 16-bit floating point in its own type."""
        if weight is None:
            if (halves := draft.halves(node)) is not None:
                draft.swap(node, torch.Tensor.to, halves, node.meta["val"].dtype)
            else:
                node.target = ops.dequantize_packed
            return
        value = node.meta["val"]
        draft.swap(
            node,
            kernels.spelled_out,
            draft.integers(f"{weight.name}.data", weight.data, weight),
            draft.constant(f"{weight.name}.scale", weight.scale),
            draft.integers(f"{weight.name}.zero", weight.zero, weight),
            _groups(draft, weight),
            tuple(value.shape),
            value.dtype,
        )

    def fake_quantize(self, draft: Draft, node: fx.Node) -> None:
        """QuantizeLinear and DequantizeLinear where they compute the same, else plain operators."""
        x, fmt = node.args[0], format_of(node)
        scale, zero = (*node.args[2:], None, None)[:2]
        assert isinstance(x, fx.Node) and fmt is not None
        value, known, middle = x.meta["val"], draft.param(scale), draft.param(zero)
        axis = _axis(known, tuple(value.shape)) if (zero is None) == (middle is None) else None
        whole = fmt.full or fmt.mirrored
        special = not fmt.is_integer or fmt.bits > 8 or fmt.scale is not None or fmt.clip != 1.0
        if why := unwritable(fmt):
            raise BackendError(
                f"{self.name}: node {node_id(node)} {why}; assign another format to it, or run it "
                "with --backend reference"
            )
        if special or (value.dtype == torch.float64 and not self.float32):
            node.target = ops.fake_quantize  # QuantizeLinear takes no float64
        elif known is not None and axis is not None:
            self._static(draft, node, fmt, known, middle, axis)
        elif scale is None and str(fmt) == "uint8:tensor:asym:dynamic":
            draft.swap(node, kernels.quantize_dynamic_uint8, x)
        elif scale is None and fmt.symmetric and not whole and (axes := axes_of(fmt, x)):
            draft.swap(node, kernels.quantize_dynamic, x, axes, fmt.qmax)
        else:
            node.target = ops.fake_quantize

    def quantize(self, draft: Draft, node: fx.Node) -> None:
        """QuantizeLinear where the scale is stored, else plain operators: with a scale from the
        data OpenVINO (2026.4) runs it in reference code, which on one machine was seen to return
        the greatest number everywhere."""
        known = draft.param(node.args[2]) is not None
        node.target = kernels.quantize if known else ops.quantize_integers

    def _static(
        self,
        draft: Draft,
        node: fx.Node,
        fmt: QFormat,
        scale: Tensor,
        zero: Tensor | None,
        axis: int,
    ) -> None:
        x, name = node.args[0], node.args[2]
        assert isinstance(x, fx.Node) and isinstance(name, fx.Node)
        offset = 128 if fmt.signed else 0
        if fmt.symmetric and non_negative(x):
            offset = 0  # the same numbers, and a Relu in front becomes part of the rounding
        shape = () if scale.numel() == 1 else (-1,)
        middle = (torch.zeros_like(scale) if zero is None else zero).reshape(shape) + offset
        called = f"zero_{int(middle)}" if not shape else f"{draft.names[name.name]}.zero_{offset}"
        draft.swap(
            node,
            kernels.quantize_static,
            x,
            draft.constant(draft.names[name.name], scale.float().reshape(shape)),
            draft.constant(called, middle.to(torch.uint8)),
            max(fmt.qmin + offset, 0),
            fmt.qmax + offset,
            axis,
        )

    def sparse_linear(self, draft: Draft, node: fx.Node) -> None:
        """ONNX has no sparse product: the entries are laid out in a matrix when it is loaded."""
        x, values, columns, rows = node.args
        assert isinstance(x, fx.Node) and isinstance(columns, fx.Node)
        starts, at = draft.param(rows), draft.param(columns)
        assert starts is not None and at is not None
        width = int(x.meta["val"].shape[-1])
        row_of = torch.arange(len(starts) - 1).repeat_interleave(starts.long().diff())
        places = draft.constant(
            f"{draft.names[columns.name]}.places", (row_of * width + at).to(torch.int32)
        )
        draft.swap(node, kernels.scattered_linear, x, values, places, len(starts) - 1)


def _plain(function: Callable[..., object]) -> Callable[[Draft, fx.Node], None]:
    """The rule that a node calls `function`, with the arguments that it has."""

    def rule(draft: Draft, node: fx.Node) -> None:
        node.target = function

    return rule


def _adaptive_mean(draft: Draft, node: fx.Node) -> None:
    """torch's exporter writes other numbers where a size that is divided is a symbol."""
    x, counts = node.args
    assert isinstance(x, fx.Node) and isinstance(counts, list | tuple)
    sizes = x.meta["val"].shape[-len(counts) :]
    if not all(isinstance(n, int) for n in sizes):
        node.target = kernels.adaptive_mean


def _even(weight: Weight) -> bool:
    """Whether all groups of a row are of one size."""
    return weight.group * weight.scale.shape[1] == weight.data.shape[1]


def _groups(draft: Draft, weight: Weight) -> fx.Node | None:
    """The number of each column's scale; None for one scale in a row."""
    if weight.scale.shape[1] == 1:
        return None
    width = weight.data.shape[1]
    return draft.constant(f"group_{width}_{weight.group}", torch.arange(width) // weight.group)


def _axis(scale: Tensor | None, shape: tuple[int | torch.SymInt, ...]) -> int | None:
    """The axis of `shape` along which scales differ (any, for a single one); None for several."""
    if scale is None:
        return None
    if scale.numel() == 1:
        return 0
    axes = [axis for axis, size in enumerate(scale.shape) if size != 1]
    fits = len(axes) == 1 and scale.ndim == len(shape) and shape[axes[0]] == scale.shape[axes[0]]
    return axes[0] if fits else None


def format_of(node: fx.Node | None) -> QFormat | None:
    """The format to which `node` rounds, if it does."""
    if node is None or node.target is not qc.fake_quantize.default:
        return None
    return QFormat.parse(str(node.args[1]))


def unwritable(fmt: QFormat | None) -> str | None:
    """Why an activation cannot be rounded to `fmt` in an ONNX file; None if it can."""
    if fmt is not None and (isinstance(fmt.kind, Minifloat | Half) or fmt.scale is not None):
        return f"rounds to {fmt}, for which ONNX has no operators"
    return None


def axes_of(fmt: QFormat, node: fx.Node) -> tuple[int, ...]:
    """The trailing axes that share a scale; empty if a scale is for a part of an axis."""
    rank = node.meta["val"].ndim
    block = (-1,) * rank if fmt.block is None else fmt.block[-rank:]
    return tuple(range(-len(block), 0)) if set(block) == {-1} else ()


def non_negative(node: fx.Node) -> bool:
    """Whether `node` yields no negative number, seen through what only moves numbers."""
    moves = (aten.max_pool2d.default, aten.reshape.default, aten.flatten.using_ints)
    while node.target in moves and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.target is aten.relu.default
