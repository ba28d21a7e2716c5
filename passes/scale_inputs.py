"""A scale at run time where no parameter can take one: ones for `smooth` to fill.

    x Wᵀ   →   (x ∘ 1) Wᵀ

SmoothQuant divides an activation by s in whatever produces it. Behind a GELU, or attention whose
values several heads share, no parameter can take 1/s; a product can, for one multiplication a
number beside the many of the layer that reads it. Each input gets one, all its linears read that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.program import node_id
from qcompiler.sites import Site, sites
from qcompiler.spaces import inputs_of


@dataclass(frozen=True, kw_only=True)
class ScaleInputs(Pass):
    """Put a scale in front of linears whose input no parameter can scale."""

    name: ClassVar[str] = "scale_inputs"
    effect: ClassVar[Effect] = Effect.EXACT
    reads: ClassVar[tuple[str, ...]] = ("weights",)
    destroys: ClassVar[tuple[str, ...]] = ("scales",)

    def run(self, edit: Edit, facts: Facts) -> None:
        refused = dict(inputs_of(facts.program, "diagonal").refusals)
        plan = facts.program.plan
        readers: dict[fx.Node, list[Site]] = {}
        for site in sites(edit.nodes):
            if site.id not in refused or site.x is None:
                continue
            if site.kind.name != "linear":
                edit.skip(site.node, "only linears take a scale in front of them")
            elif plan and site.id not in plan:
                edit.skip(site.node, "the plan leaves it in floating point")
            else:
                readers.setdefault(site.x, []).append(site)
        for x, group in readers.items():
            names = ", ".join(site.id for site in group)
            edit.spend(f"a scale in front of {names}: {refused[group[0].id]}", *_nodes(group))
            value = x.meta["val"]
            ones = torch.ones(value.shape[-1], dtype=value.dtype)
            scale = edit.new_param(f"{node_id(x)}.scale", ones, like=group[0].node)
            product = edit.call(torch.ops.aten.mul.Tensor, x, scale, like=group[0].node)
            edit.replace(x, product, only=_nodes(group))


def _nodes(group: list[Site]) -> list[fx.Node]:
    return [site.node for site in group]
