"""The program in the operators that ONNX Runtime computes fastest, exactly."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import fx
from torch.fx.node import Argument

from qcompiler import ops
from qcompiler.attention import LAYS_OUT
from qcompiler.backends.onnxruntime import capabilities as names
from qcompiler.backends.onnxruntime import kernels
from qcompiler.backends.onnxruntime.layout import Plane, block_of, planes
from qcompiler.export import kernels as export
from qcompiler.export.dialect import Dialect, axes_of, format_of
from qcompiler.export.draft import Draft
from qcompiler.export.weights import Weight, container
from qcompiler.formats import QFormat, Scheme
from qcompiler.sites import Site

aten = torch.ops.aten
MOVED = LAYS_OUT | {aten.relu.default, aten.max_pool2d.default, aten.slice.Tensor}
"""Operators that may as well be computed on codes."""


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

    def quantize(self, draft: Draft, node: fx.Node) -> None:
        """QuantizeLinear, wherever its scale is from."""
        node.target = export.quantize

    def site(self, draft: Draft, site: Site) -> None:
        """The best of the kernels that the table of capabilities gives the site."""
        weight, x = self.weight(draft, site.weight), format_of(site.x)
        kernel, words = None, ""
        if weight is not None:
            kernel, words = self._kernel(draft, site, weight, x)
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
            names.NBITS_INT8: self._nbits_int8,
            names.GATHER: self.gather,
        }
        if make := makers.get(kernel):
            make(draft, site, weight)
        draft.kernels[site.id] = words

    def _kernel(
        self, draft: Draft, site: Site, weight: Weight, x: QFormat | None
    ) -> tuple[str | None, str]:
        """(name of the kernel that serves the site here, the same with why)."""
        scheme = Scheme(weight.format, x)
        found = [c.kernel for c in names.kernels_of(site, scheme, self._kernels)]
        if not found:
            return None, ""
        if found[0] == names.CONV_QDQ:
            fits = _requantized(site.node) and _bias_fits(draft, site, weight)
            kernel = names.CONV_QDQ if fits else names.CONV
            return kernel, kernel
        if site.kind.name != "linear" or find_spec("onnxruntime") is None:
            return found[0], found[0]
        from qcompiler.backends.onnxruntime import choose

        out, width = weight.data.shape
        return choose.best(found, (out, width), scheme)

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
        inputs = self._tokens[source], zero, *rows, site.bias, not weight.nibbles
        draft.swap(site.node, kernels.integer_linear, *inputs)

    def _qdq(self, draft: Draft, site: Site, weight: Weight) -> None:
        rows = draft.stored(weight, transpose=True)[:3]
        draft.swap(site.node, kernels.qdq_linear, site.x, *rows, site.bias, not weight.nibbles)

    def _nbits(self, draft: Draft, site: Site, weight: Weight) -> None:
        block = block_of(weight.format, weight.data.shape[1])
        assert block is not None and site.x is not None
        stored = _planes(draft, weight, planes(weight, block))
        bits = min(container(weight.format.bits), 4)
        draft.swap(site.node, kernels.nbits_linear, site.x, stored, site.bias, bits, block, 1)

    def _nbits_int8(self, draft: Draft, site: Site, weight: Weight) -> None:
        """The kernel rounds the input itself."""
        source, width = site.x, weight.data.shape[1]
        block = block_of(weight.format, width, format_of(source))
        assert block is not None and source is not None
        stored = _planes(draft, weight, planes(weight, block, integers=True))
        bits = container(weight.format.bits)
        x = source.args[0]
        draft.swap(site.node, kernels.nbits_linear, x, stored, site.bias, bits, block, 4)


def _planes(draft: Draft, weight: Weight, found: list[Plane]) -> list[Argument]:
    """Constants for data, scale and zero points of each plane."""
    return [
        tuple(
            draft.constant(f"{weight.name}.plane{i}.{part}", t)
            for part, t in (("data", p.data), ("scale", p.scale), ("zero", p.zero))
        )
        for i, p in enumerate(found)
    ]


def _requantized(node: fx.Node) -> bool:
    """Whether nothing but one static format reads `node`, maybe behind a Relu and a maximum, with
    which rounding may change places."""
    users = list(node.users)
    for between in (aten.relu.default, aten.max_pool2d.default):
        if len(users) == 1 and users[0].target is between:
            users = list(users[0].users)
    fmt = format_of(users[0]) if len(users) == 1 else None
    return fmt is not None and fmt.block is None and not fmt.dynamic


def _keep_floating(draft: Draft, site: Site, fmt: QFormat | None) -> None:
    """Keep a weight that no kernel reads in floating point.

    ONNX Runtime rounds it to int8, with one scale for all of it, where the product stands between
    DequantizeLinear and QuantizeLinear; so the input's rounding is written in plain operators.
    """
    static = any((f := format_of(u)) is not None and not f.dynamic for u in _behind(site.node))
    if site.x is None or fmt is None or fmt.dynamic or not static:
        return
    assert site.kind.x is not None
    spelled = draft.call(site.node, ops.fake_quantize, *site.x.args)
    site.node.update_arg(site.kind.x, spelled)


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    """What reads `node`, also behind what ONNX Runtime lets a rounding change places with."""
    for user in node.users:
        yield user
        if user.target in MOVED:
            yield from _behind(user)


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
