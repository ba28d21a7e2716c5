"""Shift: centre the channels of activations, and let biases take it back.

    z_j = (max X_j + min X_j) / 2        x' = x - z,   b' = b + z Wᵀ

Outlier Suppression+ (Wei et al. 2023, section 4.1); SmoothQuant with bias. Channels whose range
lies to one side waste half of a symmetric grid, and one range for all channels becomes as wide as
their offsets. Whoever makes x takes -z in its own bias: a LayerNorm, or a linear behind which
nothing stands but views and attention's average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.program import Program
from qcompiler.spaces import inputs_of
from qcompiler.spaces.apply import apply_shift
from qcompiler.spaces.demand import demand
from qcompiler.spaces.trial import noise, of_inputs


@dataclass(frozen=True, kw_only=True)
class Shift(Pass):
    """Centre each channel of the inputs of layers; biases take it back (Outlier Suppression+)."""

    name: ClassVar[str] = "shift"
    effect: ClassVar[Effect] = Effect.EXACT
    makes: ClassVar[tuple[str, ...]] = ("shifts",)
    reads: ClassVar[tuple[str, ...]] = ("weights",)
    destroys: ClassVar[tuple[str, ...]] = ("splits",)
    needs: ClassVar[tuple[str, ...]] = ("activations",)

    demand: tuple[str, ...] = ()
    """Patterns of layers whose inputs must be shifted; if one cannot be, nothing is done."""

    def needs_for(self, program: Program) -> tuple[str, ...]:
        """With a plan, a shift must pay under its formats."""
        return (*self.needs, "samples") if program.plan else self.needs

    def run(self, edit: Edit, facts: Facts) -> None:
        found = inputs_of(facts.program, "shift")
        for site, why in found.refusals:
            edit.skip(site, why)
        taken, left = [], []
        for number, group in enumerate(found.groups):
            facts.tick(number, len(found.groups))
            high, low = (of_inputs(facts, group, what) for what in ("maximum", "minimum"))
            shift, words = -(high + low) / 2, ""
            if facts.program.plan:
                before, after = noise(facts, group), noise(facts, group, shift=shift)
                words = f" (noise {before:.3g} → {after:.3g})"
                if not after < before:
                    left.append((group.space, f"a shift of its inputs does not pay{words}"))
                    edit.skip(group.sites[0].id, left[-1][1])
                    continue
            taken.append(group.space)
            makers = ", ".join(m.name for m in group.space.params if m.makes)
            edit.spend(f"inputs of {group.names} are centred by {makers}{words}")
            apply_shift(edit, group.space, shift, f"shift.{number}")
        demand(self.name, self.demand, taken, found.blocked, left)
