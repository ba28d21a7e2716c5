"""Operators that only lay a value out: its numbers stay what they are, and its channels its own."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import fx

aten = torch.ops.aten

PASS: set[object] = {
    aten.neg.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.type_as.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.dropout.default,
}
RESHAPES = {
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.squeeze.dims,
    aten.unflatten.int,
}
PERMUTATIONS = {aten.transpose.int, aten.permute.default, aten.t.default}
LAYOUT = PASS | RESHAPES | PERMUTATIONS | {aten.slice.Tensor, aten.cat.default, aten.select.int}


def layouts(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Those of `nodes`, in order, that only lay a parameter out.

    A layout behind arithmetic belongs to the arithmetic.
    """
    found: set[fx.Node] = set()
    for node in nodes:
        if node.target in LAYOUT and all(
            source.op == "placeholder" or source in found for source in node.all_input_nodes
        ):
            found.add(node)
    return found


def in_place(
    node: fx.Node, weights: Container[fx.Node], layouts: Container[fx.Node]
) -> list[fx.Node]:
    """Who reads a weight as it is: layers, and layouts of a parameter that layers read.

    What computes another weight from it is none of them.
    """
    return [
        user
        for user in node.users
        if user not in weights or (user in layouts and in_place(user, weights, layouts))
    ]
