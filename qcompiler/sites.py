"""Sites: the nodes whose weight and input can be quantized.

One table says which argument is which, for every operator that has a weight; whatever is not in it
is no site.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from qcompiler.program import node_id

aten = torch.ops.aten


@dataclass(frozen=True)
class SiteKind:
    """Positions of the arguments of one operator with a weight."""

    name: str
    x: int | None
    """Activation; None where the input are indices (embedding)."""
    weight: int
    bias: int | None
    channel: int
    """Axis of x that is contracted with the weight's axis 1."""


KINDS: dict[object, SiteKind] = {
    aten.linear.default: SiteKind("linear", 0, 1, 2, -1),
    aten.conv1d.default: SiteKind("conv", 0, 1, 2, 1),
    aten.conv2d.default: SiteKind("conv", 0, 1, 2, 1),
    aten.embedding.default: SiteKind("embedding", None, 0, None, -1),
}


@dataclass(frozen=True)
class Edge:
    """An activation where a node reads it: what is measured, and may be rounded there."""

    name: str
    """What its statistics are kept under; a site's own id."""
    reader: fx.Node
    index: int
    """Which argument of the reader."""
    channel: int
    """Axis of the channels."""

    @property
    def x(self) -> fx.Node:
        value = self.reader.args[self.index]
        assert isinstance(value, fx.Node)
        return value


@dataclass(frozen=True)
class Site:
    """One node with a weight."""

    node: fx.Node
    kind: SiteKind

    @property
    def id(self) -> str:
        return node_id(self.node)

    @property
    def x(self) -> fx.Node | None:
        return None if self.kind.x is None else self._argument(self.kind.x)

    @property
    def input(self) -> Edge | None:
        """The edge of the activation, if there is one."""
        if self.kind.x is None or self.x is None:
            return None
        return Edge(self.id, self.node, self.kind.x, self.kind.channel)

    @property
    def weight(self) -> fx.Node:
        node = self._argument(self.kind.weight)
        assert node is not None
        return node

    @property
    def bias(self) -> fx.Node | None:
        return None if self.kind.bias is None else self._argument(self.kind.bias)

    def _argument(self, index: int) -> fx.Node | None:
        value = self.node.args[index] if len(self.node.args) > index else None
        return value if isinstance(value, fx.Node) else None


def site_of(node: fx.Node) -> Site | None:
    """The site that `node` is, or None."""
    kind = KINDS.get(node.target) if node.op == "call_function" else None
    if kind is None or not isinstance(node.args[kind.weight], fx.Node):
        return None
    return Site(node, kind)


def sites(nodes: Iterable[fx.Node]) -> list[Site]:
    """All sites among `nodes`, in order."""
    return [s for s in map(site_of, nodes) if s is not None]
