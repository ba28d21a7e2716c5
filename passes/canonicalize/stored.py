"""Weights that a file holds as unpacked integers, stored as `quantize` stores them.

    dequantize_integers(Q, s, z) = dequantize(pack(Q), s, z)

Rows are packed, one for each output; scales and zero points are parameters and no expressions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from qcompiler.edit import Edit
from qcompiler.formats import QFormat
from qcompiler.passes.canonicalize.layout import order_of
from qcompiler.passes.canonicalize.match import is_call
from qcompiler.program import Tag, node_id, shape_of
from qcompiler.sites import sites

aten = torch.ops.aten
qc = torch.ops.qc


def value_of(edit: Edit, node: fx.Node) -> Tensor:
    """The value of an expression of parameters, in its own types."""
    if edit.param_of(node) is not None:
        return edit.tensor(node)
    values = {n: value_of(edit, n) for n in node.all_input_nodes}
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result


def constant(edit: Edit, node: fx.Node | None, like: fx.Node) -> fx.Node | None:
    """`node`, or one parameter in place of an expression of parameters."""
    if node is None or not edit.is_weight(node) or edit.param_of(node) is not None:
        return node
    leaf = node
    while leaf.all_input_nodes:
        leaf = leaf.all_input_nodes[0]
    value = value_of(edit, node)
    value = value.reshape([]) if value.numel() == 1 else value.contiguous()
    return edit.new_param(node_id(leaf), value, like=like)


def raise_tables(edit: Edit) -> None:
    """Dequantized rows of a table of integers are rows of the dequantized table."""
    for node in edit.calls(qc.dequantize_integers.default):
        rows, text, scale, zero, dtype = node.args
        table, places = rows.args[:2] if is_call(rows, aten.index.Tensor) else (None, [])  # type: ignore
        fmt = QFormat.parse(text)  # type: ignore[arg-type]
        constants = edit.param_of(table) is not None and edit.is_weight(scale)
        if not constants or len(places) != 1 or fmt.block is not None:  # type: ignore[arg-type]
            continue
        q = edit.tensor(table)  # type: ignore[arg-type]
        if q.ndim != 2 or edit.is_weight(places[0]):  # type: ignore[index]
            continue  # stored indices may count from the end, which an embedding's do not
        edit.spend("a stored table", node)
        s, z = (None if n is None else value_of(edit, n) for n in (scale, zero))  # type: ignore
        weight = _store(edit, table, fmt, q, s, z, dtype, node)  # type: ignore[arg-type]
        args = (weight, places[0])  # type: ignore[index]
        new = edit.call(aten.embedding.default, *args, like=node, replaces=[node])
        edit.replace(node, new)


def store_weights(edit: Edit) -> None:
    """The equation above, for the weight of each site, also behind a transposition."""
    known: dict[tuple[fx.Node, bool], fx.Node] = {}
    for site in sites(edit.nodes):
        turned = order_of(site.weight) == [1, 0]
        node = site.weight.args[0] if turned else site.weight
        if not is_call(node, qc.dequantize_integers.default) or not edit.is_weight(node):
            continue
        assert isinstance(node, fx.Node)
        q, text, scale, zero, dtype = node.args
        packed = _rows(QFormat.parse(text), len(shape_of(node)), turned)  # type: ignore[arg-type]
        if packed is None or edit.param_of(q) is None:
            edit.skip(site.node, f"its weight is stored as {text}, which is not by rows")
            continue
        edit.spend("stored integers, packed by rows", site.node, node)
        if (node, turned) not in known:
            tensors = [None if n is None else value_of(edit, n) for n in (q, scale, zero)]  # type: ignore
            tensors = [t.t() if turned and t is not None and t.ndim == 2 else t for t in tensors]
            known[node, turned] = _store(edit, q, packed, *tensors, dtype, site.node)  # type: ignore
        edit.rewire(site.node, site.kind.weight, known[node, turned])


def settle_stored(edit: Edit) -> None:
    """A stored weight's parts are parameters: what a file reshapes first is stored reshaped."""
    for node in edit.calls(qc.dequantize.default):
        if edit.is_weight(node) and any(
            isinstance(n, fx.Node) and edit.param_of(n) is None and n.target is not node.target
            for n in node.args[:3]
        ):
            edit.spend("parts of a stored weight, as they are read", node)
            parts = [constant(edit, n, node) for n in node.args[:3]]  # type: ignore[arg-type]
            args = (*parts, *node.args[3:])
            edit.replace(node, edit.call(node.target, *args, like=node, replaces=[node]))  # type: ignore


def _rows(fmt: QFormat, rank: int, turned: bool) -> QFormat | None:
    """`fmt` as a format of the rows (outputs, all else) of a weight; None if it is none."""
    if fmt.block is None:
        return fmt
    block = (1,) * (rank - len(fmt.block)) + fmt.block
    if turned:
        block = block[::-1]
    if rank > 2:
        return replace(fmt, block=(-1,)) if block == (1, *[-1] * (rank - 1)) else None
    return replace(fmt, block=block[1:] if block[0] == 1 else block)


def stored_weight(
    edit: Edit, name: fx.Node, q: Tensor, scale: Tensor, zero: Tensor | None, like: fx.Node
) -> fx.Node:
    """The weight (q - zero) · scale of 8 bit integers (outputs, …), one scale or one a row."""
    element = "int8" if q.dtype == torch.int8 else "uint8"
    plain = element == "int8" and (zero is None or not zero.any())
    rows = scale.numel() > 1 or (zero is not None and zero.numel() > 1)
    fmt = QFormat(element, (-1,) if rows else None, symmetric=plain, full=plain)
    count = q.shape[0] if rows else 1
    zeros = torch.zeros(1) if zero is None else zero
    scale, zeros = (t.reshape(-1, 1).expand(count, 1) for t in (scale, zeros))
    return _store(edit, name, fmt, q, scale, None if plain else zeros, torch.float32, like)


def _store(
    edit: Edit,
    name: fx.Node,
    fmt: QFormat,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    dtype: torch.dtype,
    like: fx.Node,
) -> fx.Node:
    """dequantize of new parameters that hold `q` by rows, in the shape of `q`."""
    if fmt.full and int(q.min()) > fmt.qmin:
        fmt = replace(fmt, full=False)  # kernels serve the symmetric range
    rows = q.reshape(q.shape[0], -1)
    scale = scale.reshape(fmt.scale_shape(tuple(rows.shape))).float().contiguous()
    parts = {"data": fmt.pack(rows), "scale": scale}
    if zero is not None:
        parts["zero"] = zero.reshape(scale.shape).to(torch.int16).contiguous()
    stem = Tag.of(name).id
    data, s, *z = (edit.new_param(f"{stem}.{k}", v, like=name) for k, v in parts.items())
    args = (data, s, z[0] if z else None, str(fmt), rows.shape[1], dtype)
    new = edit.call(qc.dequantize.default, *args, like=like)
    if q.ndim != 2:
        new = edit.call(aten.reshape.default, new, list(q.shape), like=like)
    return new
