"""Putting a diagonal map on a space: one parameter, read by every edge that it scales."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.spaces.system import Member, Space

aten = torch.ops.aten


def apply_scale(edit: Edit, space: Space, scale: Tensor, name: str) -> None:
    """Multiply each parameter of `space` by scale ** exponent, on the parameter's edge.

    `scale` is (space.size,), positive and finite. It becomes the parameter `name`; nothing is
    computed now, so the edit is exact by construction and `fold` rounds once.
    """
    if space.blocked_by:
        first = space.blocked_by[0]
        raise BadInput(f"space {space.id} is blocked at {first.node}: {first.reason}")
    if tuple(scale.shape) != (space.size,):
        raise BadInput(f"space {space.id} takes {space.size} scales; found {list(scale.shape)}")
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise BadInput(f"scales of space {space.id} must be positive and finite")
    first_node = space.params[0].node
    source = edit.new_param(name, scale.to(torch.float32), like=first_node)
    edges = {n.name: n for n in edit.graph.nodes}
    for number, member in enumerate(space.params):
        node = edges[member.node.name]
        factor = _factor(edit, source, member, f"{name}.index{number}", space.size)
        edges[member.node.name] = _scaled(edit, node, factor, member.exponent)


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
