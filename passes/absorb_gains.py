"""Move the gains of RMSNorm into the weights that read it.

    (core(x) ∘ g) Wᵀ = core(x) (W diag(g))ᵀ

Without gain, RMSNorm's core commutes with rotations (QuaRot, Ashkboos et al. 2024, section 3.1).
Where the readers are, the diagonal space behind the norm says; no division, so a gain may be zero.
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
from qcompiler.spaces import Space
from qcompiler.spaces import find as find_spaces
from qcompiler.spaces.apply import spread

GAIN = 2
"""Number of the gain among the arguments of rms_norm."""


@dataclass(frozen=True, kw_only=True)
class AbsorbGains(Pass):
    """Fold RMSNorm gains into their readers."""

    name: ClassVar[str] = "absorb_gains"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, edit: Edit, facts: Facts) -> None:
        found = find_spaces(facts.program)
        for node in edit.calls(torch.ops.aten.rms_norm.default):
            gain = node.args[GAIN] if len(node.args) > GAIN else None
            if not isinstance(gain, fx.Node) or not edit.is_weight(gain):
                continue
            space, why = _space_of(found, gain)
            if space is None:
                edit.skip(node, f"its gain stays: {why}")
                continue
            readers = ", ".join(m.name for m in space.consumers)
            edit.spend(f"gain {node_id(gain)} moves into {readers}", node)
            spread(edit, gain, space, space.consumers, -1)
            edit.rewire(node, GAIN, None)


def _space_of(found: list[Space], gain: fx.Node) -> tuple[Space | None, str]:
    """The space in which `gain` is the only producer, or why there is none."""
    why = "it is read through an expression"
    for space in found:
        if gain.name not in {m.node.name for m in space.producers}:
            continue
        if space.blocked_by:
            first = space.blocked_by[0]
            why = f"{first.reason} at {first.node}"
        elif len(space.producers) > 1 or len(gain.users) > 1:
            why = "other parameters would have to take its inverse"
        elif not torch.equal(space.producers[0].index.flatten(), torch.arange(space.size)):
            why = "its channels are shared or only some of them are free"
        elif space.consumers:
            return space, ""
    return None, why
