"""Putting a map on a space: one parameter, read by every edge that it changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.program import node_id
from qcompiler.spaces.system import Member, Space

aten = torch.ops.aten


def apply_scale(edit: Edit, space: Space, scale: Tensor, name: str) -> None:
    """Multiply each parameter of `space` by scale ** exponent, on the parameter's edge.

    `scale` is (space.size,), positive and finite. It becomes the parameter `name`; nothing is
    computed now, so the edit is exact by construction and `fold` rounds once.
    """
    if space.blocked_by:
        blocker = space.blocked_by[0]
        raise BadInput(f"space {space.id} is blocked at {blocker.node}: {blocker.reason}")
    if tuple(scale.shape) != (space.size,):
        raise BadInput(f"space {space.id} takes {space.size} scales; found {list(scale.shape)}")
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise BadInput(f"scales of space {space.id} must be positive and finite")
    first = space.params[0].node
    source = edit.new_param(name, scale.to(torch.float32), like=first)
    spread(edit, source, space, space.params, 1)


def spread(
    edit: Edit, source: fx.Node, space: Space, members: Sequence[Member], power: int
) -> dict[fx.Node, fx.Node]:
    """Multiply `members` by source ** (power · exponent), `source` being (space.size,).

    Returns the multiplied nodes, each with what it was before.
    """
    edges = {n.name: n for n in edit.graph.nodes}
    before: dict[fx.Node, fx.Node] = {}
    for number, member in enumerate(members):
        node = edges[member.node.name]
        factor = _factor(edit, source, member, f"{node_id(source)}.index{number}", space.size)
        scaled = _scaled(edit, node, factor, power * member.exponent)
        edges[member.node.name] = scaled
        before[scaled] = before.get(node, node)
    return before


def _factor(edit: Edit, source: fx.Node, member: Member, name: str, size: int) -> fx.Node:
    """The scale laid out along the parameter's axes; 1 where the space has no say."""
    index = member.index
    flat = index.reshape(-1)
    if torch.equal(flat, torch.arange(size)):
        picked = source
    else:
        padded = source
        if bool((flat == size).any()):
            padded = edit.call(aten.constant_pad_nd.default, source, [0, 1], 1.0, like=source)
        where = edit.new_param(name, flat, like=source)
        picked = edit.call(aten.index_select.default, padded, 0, where, like=source)
    if index.ndim == 1:
        return picked
    return edit.call(aten.reshape.default, picked, list(index.shape), like=source)


def _scaled(edit: Edit, node: fx.Node, factor: fx.Node, exponent: int) -> fx.Node:
    users = list(node.users)
    target = aten.mul.Tensor if exponent > 0 else aten.div.Tensor
    scaled = node
    for _ in range(abs(exponent)):
        scaled = edit.call(target, scaled, factor, like=node)
    if scaled.meta["val"].dtype != node.meta["val"].dtype:
        scaled = edit.call(aten.to.dtype, scaled, node.meta["val"].dtype, like=node)
    edit.replace(node, scaled, only=users)
    return scaled


def gather(values: Tensor, member: Member, size: int) -> Tensor:
    """Largest value of each scale's channels: the inverse of laying a scale out. Shape (size,).

    `values` has the shape of `member.index`, or broadcasts to it.
    """
    index = member.index.reshape(-1)
    flat = values.expand(member.index.shape).reshape(-1).float()
    out = torch.zeros(size + 1)
    return out.scatter_reduce(0, index, flat, "amax")[:size]


def apply_matrix(edit: Edit, space: Space, matrix: Tensor, name: str) -> fx.Node:
    """Mix the channels of each parameter of `space` by T or its inverse, on the parameter's edge.

    `matrix` is T (size, size). It becomes the parameter `name` in float64: an orthogonal matrix in
    float32 is orthogonal to 1e-7 only. Returns its node.
    """
    if tuple(matrix.shape) != (space.size, space.size):
        raise BadInput(
            f"space {space.id} takes a {space.size} × {space.size} matrix; "
            f"found {list(matrix.shape)}"
        )
    matrix = matrix.double()
    gap = float((matrix @ matrix.t() - torch.eye(space.size, dtype=torch.float64)).abs().max())
    if space.kind == "orthogonal" and not gap <= 1e-12:
        raise BadInput(f"space {space.id} takes an orthogonal matrix; T Tᵀ is off by {gap:.1e}")
    if not float(torch.linalg.cond(matrix)) < 1e6:
        raise BadInput(f"space {space.id} takes an invertible matrix; this one is nearly singular")
    first = space.params[0].node
    source = edit.new_param(name, matrix, like=first)
    forward = edit.call(aten.t.default, source, like=first)
    backward = forward
    if space.kind != "orthogonal" and space.consumers:
        backward = edit.new_param(f"{name}.inverse", torch.linalg.inv(matrix), like=first)
    edges = {n.name: n for n in edit.graph.nodes}
    for member in space.params:
        node = edges[member.node.name]
        factor = forward if member.exponent > 0 else backward
        edges[member.node.name] = _mixed(edit, node, factor, member, space.size)
    return source


def _mixed(edit: Edit, node: fx.Node, factor: fx.Node, member: Member, size: int) -> fx.Node:
    """`node` with the channels along the member's axis multiplied by `factor` from the right."""
    users = list(node.users)
    dtype, rank = node.meta["val"].dtype, node.meta["val"].ndim
    shape = [int(n) for n in node.meta["val"].shape]
    last = rank - 1
    shape[member.axis], shape[last] = shape[last], shape[member.axis]
    order, count = _copies(member.index, size)
    x = edit.call(aten.to.dtype, node, torch.float64, like=node)
    if member.axis != last:
        x = edit.call(aten.transpose.int, x, member.axis, last, like=node)
    sorted_already = torch.equal(order, torch.arange(len(order)))
    if not sorted_already:
        x = edit.call(aten.index_select.default, x, last, _order(edit, order, node), like=node)
    mixed = x
    if count < shape[last]:
        mixed = edit.call(aten.slice.Tensor, x, last, 0, count, like=node)
    wide = [*shape[:last], count // size, size]
    mixed = edit.call(aten.reshape.default, mixed, wide, like=node)
    mixed = edit.call(aten.matmul.default, mixed, factor, like=node)
    mixed = edit.call(aten.reshape.default, mixed, [*shape[:last], count], like=node)
    if count < shape[last]:
        rest = edit.call(aten.slice.Tensor, x, last, count, shape[last], like=node)
        mixed = edit.call(aten.cat.default, [mixed, rest], last, like=node)
    if not sorted_already:
        back = _order(edit, torch.argsort(order), node)
        mixed = edit.call(aten.index_select.default, mixed, last, back, like=node)
    if member.axis != last:
        mixed = edit.call(aten.transpose.int, mixed, member.axis, last, like=node)
    mixed = edit.call(aten.to.dtype, mixed, dtype, like=node)
    edit.replace(node, mixed, only=users)
    return mixed


def _order(edit: Edit, order: Tensor, like: fx.Node) -> fx.Node:
    return edit.new_param(f"{node_id(like)}.order", order, like=like)


def _copies(channel: Tensor, size: int) -> tuple[Tensor, int]:
    """(order of the axis that puts whole copies of the channels first, length of these copies).

    The c-th occurrences of all channels make up copy c, since an axis term is a product.
    """
    inside = torch.nonzero(channel >= 0).flatten()
    by_channel = inside[torch.argsort(channel[inside], stable=True)].reshape(size, -1)
    outside = torch.nonzero(channel < 0).flatten()
    return torch.cat([by_channel.t().reshape(-1), outside]), len(inside)
