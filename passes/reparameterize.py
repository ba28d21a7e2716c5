"""Give every channel behind a LayerNorm the same range, so that one scale serves them all.

    x' = (x + σ) / r,   W' = W diag(r),   b' = b - σ Wᵀ        r_j = range_j / mean range

RepQ-ViT (Li et al. 2023), eqs. 8 to 10: a scale and zero point per channel, which is what these
activations need, become one scale and one zero point for the tensor, which is what kernels have;
the rest goes into the LayerNorm and its readers. σ moves each range to the common middle. It is a
scale on a diagonal space and a shift on the shift space of the same channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.spaces import Group, inputs_of
from qcompiler.spaces.apply import apply_scale, apply_shift
from qcompiler.spaces.demand import demand
from qcompiler.spaces.trial import of_inputs

FLOOR = 1e-5
"""Smallest range of a channel, relative to the mean; a constant channel has none."""


@dataclass(frozen=True, kw_only=True)
class Reparameterize(Pass):
    """Turn per-channel ranges behind LayerNorms into one range for all (RepQ-ViT)."""

    name: ClassVar[str] = "reparameterize"
    effect: ClassVar[Effect] = Effect.EXACT
    makes: ClassVar[tuple[str, ...]] = ("scales", "shifts", "maps")
    reads: ClassVar[tuple[str, ...]] = ("weights",)
    destroys: ClassVar[tuple[str, ...]] = ("splits",)
    needs: ClassVar[tuple[str, ...]] = ("activations",)

    demand: tuple[str, ...] = ()
    """Patterns of weights that must be covered; if one cannot be, nothing is done."""

    def run(self, edit: Edit, facts: Facts) -> None:
        scales, shifts = (inputs_of(facts.program, kind) for kind in ("diagonal", "shift"))
        shifted = {site.id: group for group in shifts.groups for site in group.sites}
        for site, why in {**dict(shifts.refusals), **dict(scales.refusals)}.items():
            edit.skip(site, why)
        # All scales first: a shift gives layers biases that no space knows of yet.
        shifting, left = [], []
        for number, group in enumerate(scales.groups):
            partner = _partner(group, shifted)
            if partner is None:
                left.append((group.space, "its inputs can be scaled, but not shifted alike"))
                edit.skip(group.sites[0].id, left[-1][1])
                continue
            high, low = (of_inputs(facts, group, what) for what in ("maximum", "minimum"))
            width = (high - low).clamp(min=FLOOR * float((high - low).mean()) or 1.0)
            ratio = width / width.mean()
            edit.spend(f"inputs of {group.names} get the same width in all channels")
            apply_scale(edit, group.space, 1 / ratio, f"reparameterize.{number}.scale")
            shifting.append((group, partner, -(high + low) / 2 / ratio))
        for number, (group, partner, shift) in enumerate(shifting):
            edit.spend(f"inputs of {group.names} get the same middle in all channels")
            apply_shift(edit, partner.space, shift, f"reparameterize.{number}.shift")
        taken = [group.space for group, *_ in shifting]
        demand(self.name, self.demand, taken, scales.blocked, left)


def _partner(group: Group, shifted: dict[str, Group]) -> Group | None:
    """The shift space of the same channels, read by the same layers."""
    partner = shifted.get(group.sites[0].id)
    if partner is None or {s.id for s in partner.sites} != {s.id for s in group.sites}:
        return None
    same = partner.space.size == group.space.size and all(
        torch.equal(partner.member(s).index, group.member(s).index) for s in group.sites
    )
    return partner if same else None
