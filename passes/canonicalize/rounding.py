"""Rounding that a quantized file spells out, as one operator.

dequantize_integers(quantize(x, s, z), s, z) = fake_quantize(x, s, z)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx
from torch.fx.node import Argument

from qcompiler.edit import Edit
from qcompiler.formats import QFormat
from qcompiler.passes.canonicalize.layout import VIEWS
from qcompiler.passes.canonicalize.match import is_call
from qcompiler.passes.canonicalize.stored import constant
from qcompiler.passes.canonicalize.tidy import CASTS

aten = torch.ops.aten
qc = torch.ops.qc

MOVES = (
    *VIEWS,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
)
"""What moves, repeats or leaves out elements."""
SCALAR_VIEWS = (aten.reshape.default, aten.squeeze.default, *CASTS)


def raise_rounding(edit: Edit) -> None:
    """The equation above. With one scale, what moves the integers in between moves the rounded
    numbers just as well."""
    for node in edit.calls(qc.dequantize_integers.default):
        q, *way_back, dtype = node.args
        moves: list[fx.Node] = []
        while is_call(q, *MOVES) and QFormat.parse(way_back[0]).block is None:  # type: ignore
            moves.insert(0, q)  # type: ignore[arg-type]
            q = q.args[0]  # type: ignore[union-attr]
        if not is_call(q, qc.quantize.default):
            continue
        x, *way, _integer = q.args  # type: ignore[union-attr]
        if not _same_grid(way, way_back) or x.meta["val"].dtype != dtype:  # type: ignore[union-attr]
            continue
        edit.spend("quantized and dequantized is rounded", node)
        new = _rounded(edit, node, x, way, moves)  # type: ignore[arg-type]
        edit.replace(node, new)


def _rounded(
    edit: Edit, node: fx.Node, x: fx.Node, grid: list[Argument], moves: list[fx.Node]
) -> fx.Node:
    """`x` rounded and moved; where it is read if that is the same, so that a site finds it."""
    text, scale, zero = grid
    rounded = qc.fake_quantize.default
    ranged = is_call(scale, operator.getitem) and is_range(scale.args[0], x)  # type: ignore
    if ranged:
        x = edit.call(rounded, x, scale.args[0].args[1], like=node, replaces=[node])  # type: ignore
    for move in moves:
        x = edit.call(move.target, x, *move.args[1:], like=move, replaces=[move])  # type: ignore
    if ranged:
        return x
    constants = [constant(edit, n, node) for n in (scale, zero)]  # type: ignore[arg-type]
    return edit.call(rounded, x, text, *constants, like=node, replaces=[node])


def _same_grid(a: Sequence[object], b: Sequence[object]) -> bool:
    """Whether (format, scale, zero point) are equal; single numbers may have been reshaped."""
    values = [[scalar(n) if isinstance(n, fx.Node) else n for n in grid] for grid in (a, b)]
    return values[0] == values[1]


def is_range(node: object, x: object) -> bool:
    return is_call(node, qc.dynamic_scale.default) and node.args[0] is x  # type: ignore


def scalar(node: fx.Node) -> fx.Node:
    """The value behind casts, and behind reshapes of one number."""
    while is_call(node, *SCALAR_VIEWS):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if node.target not in CASTS and source.meta["val"].numel() != 1:
            break
        node = source
    return node
