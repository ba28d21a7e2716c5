"""Embeddings: decode the rows that are read, not the whole table.

embedding( dequantize(q, s), ids )   →   dequantize( q[ids], s[ids] )
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.formats import QFormat
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.program import node_id
from qcompiler.sites import sites
from qcompiler.stored import read

aten = torch.ops.aten
qc = torch.ops.qc
TOLERANCE = 1e-6
"""Largest relative error: the same numbers, decoded in another order."""


@dataclass(frozen=True, kw_only=True)
class GatherRows(Pass):
    """Gather codes, then decode them."""

    name: ClassVar[str] = "gather_rows"
    effect: ClassVar[Effect] = Effect.LOWER

    exclude: tuple[str, ...] = ()

    def tolerance(self, facts: Facts) -> float:
        return TOLERANCE

    def run(self, edit: Edit, facts: Facts) -> None:
        for site in sites(edit.nodes):
            table = site.weight
            if site.kind.name != "embedding" or table.target is not qc.dequantize.default:
                continue
            data, scale, zero, *rest = table.args
            if site.id in self.exclude:
                continue
            if QFormat.parse(str(rest[0])).block is None:
                edit.skip(site.node, "gather takes tables with scales of rows; found one for all")
                continue
            ids = site.node.args[1]
            edit.spend("gather", site.node)
            parts = (data, _settled(edit, scale), _settled(edit, zero))
            rows = [
                None if p is None else edit.call(aten.embedding.default, p, ids, like=site.node)
                for p in parts
            ]
            new = edit.call(
                qc.dequantize.default, *rows, *rest, like=site.node, replaces=[site.node]
            )
            edit.replace(site.node, new)


def _settled(edit: Edit, node: object) -> fx.Node | None:
    """Scales or zero points as a parameter that rows can be taken of, decoded if they are stored in
    another form."""
    if not isinstance(node, fx.Node) or (kept := read(edit, node)) is None:
        return node if isinstance(node, fx.Node) else None
    value: Tensor = kept.dequantize().to(node.meta["val"].dtype)
    return edit.new_param(f"{node_id(node)}.decoded", value, like=node)
