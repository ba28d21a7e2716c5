"""Sums as sites: where the result of a convolution is added to something, both can be rounded.

    y = fakequant(conv(x)) + fakequant(r)

Runtimes have integer kernels for convolutions that yield integers, and for sums of these. Formats
for sums stand in the plan under the id of the addition.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from qcompiler.program import is_tensor, node_id, shape_of
from qcompiler.sites import Edge, site_of


@dataclass(frozen=True)
class Sum:
    """One addition of two activations, one of which a convolution yields."""

    node: fx.Node

    @property
    def id(self) -> str:
        return node_id(self.node)

    @property
    def edges(self) -> tuple[Edge, Edge]:
        """Both addends; channels are the axis behind the batch."""
        left, right = (Edge(f"{self.id}:addend{i}", self.node, i, 1) for i in range(2))
        return left, right


def sums(nodes: Iterable[fx.Node]) -> list[Sum]:
    """All such additions among `nodes`, in order."""
    return [Sum(n) for n in nodes if n.target is torch.ops.aten.add.Tensor and _of_results(n)]


def _of_results(node: fx.Node) -> bool:
    # What is no tensor is a length that is added to positions.
    parts = [a for a in node.args if isinstance(a, fx.Node) and is_tensor(a)]
    if node.kwargs or len(parts) != 2:
        return False
    convolved = any((s := site_of(a)) is not None and s.kind.name == "conv" for a in parts)
    return convolved and shape_of(parts[0]) == shape_of(parts[1])
