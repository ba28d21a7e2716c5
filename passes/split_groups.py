"""Parts of a linear's input channels as linears of their own, so that each can get its own bits.

    x Wᵀ = Σ_p x_p W_pᵀ        groups of columns in the order of Σ_ij w_ij² / [H⁻¹]²_jj, dealt to p

(SliM-LLM, Huang et al. 2024: salient groups deserve more bits than their neighbours.) The paper
moves a bit from some groups to others of a layer; here each part is a site, and what assigns bits
to sites, `allocate` say, decides over all parts of all layers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.schemes import is_head, why_not
from qcompiler.sites import Site, sites
from qcompiler.vectors import freedom

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class SplitGroups(Pass):
    """Deal a linear's input channels, by salience, to linears of their own (SliM-LLM)."""

    name: ClassVar[str] = "split_groups"
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[tuple[str, ...]] = ("samples",)
    makes: ClassVar[tuple[str, ...]] = ("splits",)
    reads: ClassVar[tuple[str, ...]] = ("weights",)

    group: int = 128
    """Neighbouring channels that stay together: those that share a scale."""
    shares: tuple[float, ...] = (0.25, 0.5, 0.25)
    """Of the channels, the most salient first; parts are whole groups."""

    def run(self, edit: Edit, facts: Facts) -> None:
        if self.group < 1:
            raise BadInput(f"split_groups: group is at least 1; found {self.group}")
        if len(self.shares) < 2 or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise BadInput(
                f"split_groups: shares are two or more that add up to 1; found {self.shares}"
            )
        made: dict[tuple[fx.Node, tuple[int, ...]], tuple[fx.Node, fx.Node]] = {}
        for site in sites(edit.nodes):
            weight = None if (why := _why_not(site, edit)) else facts.value(site.weight)
            if weight is None:
                edit.skip(site.node, why or "its weight is computed from the input")
                continue
            parts = self._deal(salience(weight.double(), facts.sample(site.id)))
            if len(parts) < 2:
                edit.skip(site.node, f"{weight.shape[1]} channels are too few to be dealt")
                continue
            sizes = " + ".join(str(len(p)) for p in parts)
            edit.spend(f"{sizes} channels, the most salient first", site.node)
            self._split(edit, site, parts, made)

    def _deal(self, felt: Tensor) -> list[Tensor]:
        """Channels of each part, in order."""
        channels = torch.arange(len(felt))
        groups = list(channels.split(self.group))
        order = torch.stack([felt[g].mean() for g in groups]).argsort(descending=True).tolist()
        ends, total = [], 0.0
        for share in self.shares:
            total += share
            ends.append(round(total * len(groups)))
        starts = [0, *ends[:-1]]
        picked = [sorted(order[a:b]) for a, b in zip(starts, ends, strict=True)]
        return [torch.cat([groups[g] for g in part]) for part in picked if part]

    def _split(
        self,
        edit: Edit,
        site: Site,
        parts: list[Tensor],
        made: dict[tuple[fx.Node, tuple[int, ...]], tuple[fx.Node, fx.Node]],
    ) -> None:
        node, stem = site.node, site.id.rpartition("/")[0] or site.id
        x = site.x
        assert x is not None
        total: fx.Node | None = None
        for number, part in enumerate(parts):
            key = (x, tuple(part.tolist()))
            if key not in made:  # readers of one input that are dealt alike share a gather
                at = edit.new_param(f"{stem}.part{number}", part.to(torch.int32), like=node)
                made[key] = at, edit.call(aten.index_select.default, x, -1, at, like=node)
            at, some = made[key]
            weight = edit.call(aten.index_select.default, site.weight, 1, at, like=node)
            bias = () if number or site.bias is None else (site.bias,)
            new = edit.call(aten.linear.default, some, weight, *bias, like=node, replaces=[node])
            total = (
                new
                if total is None
                else edit.call(aten.add.Tensor, total, new, like=node, replaces=[node])
            )
        assert total is not None
        edit.replace(node, total)


def salience(weight: Tensor, x: Tensor) -> Tensor:
    """Σ_i w_ij² / [H⁻¹]²_jj of each channel j, for a weight (out, in) and inputs (vectors, in)."""
    return weight.square().sum(0) / freedom(x).square()


def _why_not(site: Site, edit: Edit) -> str:
    if site.node.target is not aten.linear.default:
        return f"only linears are dealt, and this is of kind {site.kind.name}"
    if is_head(site.node):
        return "the last linear before an output stays whole"
    return why_not(site, edit.is_weight) or ""
