"""The program in the operators that ONNX Runtime computes fastest, exactly."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import ClassVar

import torch
from torch import fx

from qcompiler import ops
from qcompiler.backends.onnxruntime import capabilities as names
from qcompiler.backends.onnxruntime import kernels
from qcompiler.backends.onnxruntime.layout import block_of, planes
from qcompiler.export.dialect import Dialect, axes_of, format_of
from qcompiler.export.draft import Draft
from qcompiler.export.weights import Weight, container
from qcompiler.formats import QFormat, Scheme
from qcompiler.sites import Site

aten = torch.ops.aten


class OnnxRuntimeDialect(Dialect):
    """`com.microsoft` operators where they are faster; all in float32."""

    name: ClassVar[str] = "onnxruntime"
    opset: ClassVar[int] = 21
    float32: ClassVar[bool] = True

    def __init__(self, unsigned: bool = False, kernels: Collection[str] | None = None) -> None:
        """`kernels` are those that it may use; None for all."""
        super().__init__(unsigned)
        self._kernels = kernels
        self._tokens: dict[fx.Node, fx.Node] = {}

    def site(self, draft: Draft, site: Site) -> None:
        """The kernel that the table of capabilities gives the site."""
        weight, x = self.weight(draft, site.weight), format_of(site.x)
        kernel = None if weight is None else self._kernel(draft, site, weight, x)
        if kernel in (None, names.CONV, names.DEQUANTIZED):
            _keep_floating(draft, site, x)
        if weight is None or kernel is None:
            return
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

    def _kernel(self, draft: Draft, site: Site, weight: Weight, x: QFormat | None) -> str | None:
        """Name of the kernel that serves the site here."""
        found = names.kernel_of(site, Scheme(weight.format, x), self._kernels)
        if found is not None and found.kernel == names.CONV_QDQ:
            fits = _requantized(site.node) and _bias_fits(draft, site, weight)
            return names.CONV_QDQ if fits else names.CONV
        return None if found is None else found.kernel

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


def _keep_floating(draft: Draft, site: Site, fmt: QFormat | None) -> None:
    """Keep a weight that no kernel reads in floating point.

    ONNX Runtime rounds it to int8, with one scale for all of it, where the product stands between
    DequantizeLinear and QuantizeLinear; so the input's rounding is written in plain operators.
    """
    readers = [u for user in site.node.users for u in (user, *user.users)]
    static = any((f := format_of(u)) is not None and not f.dynamic for u in readers)
    if site.x is None or fmt is None or fmt.dynamic or not static:
        return
    assert site.kind.x is not None
    spelled = draft.call(site.node, ops.fake_quantize, *site.x.args)
    site.node.update_arg(site.kind.x, spelled)


def _bias_fits(draft: Draft, site: Site, weight: Weight) -> bool:
    """Whether the kernel, which rounds the bias to int32 in steps of s_x s_w, can hold it.

    A channel of next to nothing has steps of next to nothing.
    """
    assert site.x is not None
    bias, x_scale = draft.param(site.bias), draft.param(site.x.args[2])
    if bias is None or x_scale is None:
        return site.bias is None
    steps = bias.double().abs() / (weight.scale.double().reshape(-1) * x_scale.double())
    return bool((steps < 2**31 - 1).all())
