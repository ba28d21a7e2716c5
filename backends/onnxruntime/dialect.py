"""The program in the operators that ONNX Runtime computes fastest, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import fx

from qcompiler.backends.onnxruntime import capabilities as names
from qcompiler.backends.onnxruntime import kernels
from qcompiler.backends.onnxruntime.layout import block_of, planes
from qcompiler.export.dialect import Dialect, axes_of, format_of
from qcompiler.export.draft import Draft
from qcompiler.export.weights import Weight, container
from qcompiler.formats import Scheme
from qcompiler.sites import Site

aten = torch.ops.aten


class OnnxRuntimeDialect(Dialect):
    """`com.microsoft` operators where they are faster; all in float32."""

    name: ClassVar[str] = "onnxruntime"
    opset: ClassVar[int] = 21
    float32: ClassVar[bool] = True

    def __init__(self, unsigned: bool = False) -> None:
        super().__init__(unsigned)
        self._tokens: dict[fx.Node, fx.Node] = {}

    def site(self, draft: Draft, site: Site) -> None:
        """The kernel that the table of capabilities gives the site."""
        weight = self.weight(draft, site.weight)
        if weight is None:
            return
        found = names.kernel_of(site, Scheme(weight.format, format_of(site.x)))
        if found is None:
            return
        kernel = found.kernel
        if kernel == names.CONV_QDQ and not _requantized(site.node):
            kernel = names.CONV
        makers: dict[str, Callable[[Draft, Site, Weight], None]] = {
            names.INTEGER: self._integer,
            names.QDQ: self._qdq,
            names.CONV_QDQ: self.conv,
            names.NBITS: self._nbits,
            names.TWO_NBITS: self._nbits,
            names.GATHER: self.gather,
        }
        if make := makers.get(kernel):
            make(draft, site, weight)
        draft.kernels[site.id] = kernel

    def dequantize(self, draft: Draft, node: fx.Node) -> None:
        """In plain operators, which ONNX Runtime evaluates when it opens the file."""
        self.dequantize_plainly(draft, node, self.weight(draft, node))

    def _integer(self, draft: Draft, site: Site, weight: Weight) -> None:
        source, fmt = site.x, format_of(site.x)
        assert source is not None and fmt is not None
        zero = draft.constant("zero_128", torch.tensor(128, dtype=torch.uint8))
        if source not in self._tokens:
            one = draft.constant("one", torch.tensor(1.0))
            self._tokens[source] = draft.call(
                source,
                kernels.quantize_tokens,
                source.args[0],
                axes_of(fmt, source),
                fmt.qmax,
                one,
                zero,
            )
        rows = draft.stored(weight, transpose=True)[:3]
        draft.swap(site.node, kernels.integer_linear, self._tokens[source], zero, *rows, site.bias)

    def _qdq(self, draft: Draft, site: Site, weight: Weight) -> None:
        rows = draft.stored(weight, transpose=True)[:3]
        draft.swap(site.node, kernels.qdq_linear, site.x, *rows, site.bias)

    def _nbits(self, draft: Draft, site: Site, weight: Weight) -> None:
        block = block_of(weight.format, weight.data.shape[1])
        assert block is not None
        stored = [
            tuple(
                draft.constant(f"{weight.name}.plane{i}.{part}", t)
                for part, t in (("data", p.data), ("scale", p.scale), ("zero", p.zero))
            )
            for i, p in enumerate(planes(weight, block))
        ]
        bits = min(container(weight.format.bits), 4)
        draft.swap(site.node, kernels.nbits_linear, site.x, stored, site.bias, bits, block)


def _requantized(node: fx.Node) -> bool:
    """Whether nothing but one static format reads `node`, maybe behind a Relu."""
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.relu.default:
        users = list(users[0].users)
    fmt = format_of(users[0]) if len(users) == 1 else None
    return fmt is not None and fmt.block is None and not fmt.dynamic
