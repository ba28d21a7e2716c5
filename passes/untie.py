"""Give the head its own copy of the word table.

    E[ids], x Eᵀ   →   E[ids], x Hᵀ  with H = E

A table that is read at both ends of a network can take no map: what the first norm's readers would
undo is not undone at the head. It costs the bytes of one table (methods: QuaRot, SpinQuant do so).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.program import node_id

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Untie(Pass):
    """Untie embedding tables from the linears that share them."""

    name: ClassVar[str] = "untie"
    effect: ClassVar[Effect] = Effect.EXACT
    reads: ClassVar[tuple[str, ...]] = ("weights",)
    destroys: ClassVar[tuple[str, ...]] = ("rotation", "scales")

    def run(self, edit: Edit, facts: Facts) -> None:
        for node in edit.nodes:
            if edit.param_of(node) is None:
                continue
            tables = [u for u in node.users if u.target is aten.embedding.default]
            others = [u for u in node.users if u.target is not aten.embedding.default]
            if tables and others:
                readers = ", ".join(map(node_id, others))
                edit.spend(f"{readers} gets its own copy of {node_id(node)}", node)
                edit.untie(node, others)
