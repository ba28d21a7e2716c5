"""Learn the maps that are in the graph, through the quantized graph.

    min over R of  KL( float program ‖ program with Q(x Rᵀ) Q(W Rᵀ)ᵀ )        R Rᵀ = I

SpinQuant (Liu et al. 2024), section 3.2, by Cayley steps; with scales in the graph too, OSTQuant
(Hu et al. 2025): orthogonal × diagonal with a loss on the likeliest words. Rotations of `rotate`,
scales of `smooth` and matrices of `affine` are parameters on the weights' edges until `fold`
evaluates them; this pass gives them better values. The float program stays what it was, whatever
they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.learn import learn
from qcompiler.objective import OBJECTIVES, fitting
from qcompiler.passbase import Pass


@dataclass(frozen=True, kw_only=True)
class LearnRotation(Pass):
    """Train the rotations (and scales) of the graph through its quantized form."""

    name: ClassVar[str] = "learn_rotation"
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[tuple[str, ...]] = ("batches",)
    reads: ClassVar[tuple[str, ...]] = ("maps", "plan", "weights")
    destroys: ClassVar[tuple[str, ...]] = ("splits",)

    steps: int = 100
    """Batches to train on; they go round."""
    rate: float = 0.5
    """By how many radians a step turns a rotation at first; it falls to zero by a cosine."""
    draws: int = 8
    """Random rotations, of which the best is where training starts."""
    loss: Literal["auto", "kl_top", "mse"] = "auto"
    """What is made small; `auto` is `kl_top` for language models, else `mse`."""

    def run(self, edit: Edit, facts: Facts) -> None:
        program = facts.program
        if not program.plan:
            raise BadInput(
                "learn_rotation: it trains for the plan's formats; put `assign` before it"
            )
        if not program.maps:
            raise BadInput(
                "learn_rotation: no map is left to train; put `rotate` (or `smooth`) before it and "
                "`fold` behind it"
            )
        if self.steps < 0 or self.draws < 1 or not 0 < self.rate < math.inf:
            raise BadInput("learn_rotation: steps are 0 or more, draws 1 or more, rate is positive")
        loss = fitting(program) if self.loss == "auto" else self.loss
        learned = learn(
            program,
            facts.batches,
            OBJECTIVES[loss],
            steps=self.steps,
            rate=self.rate,
            draws=self.draws,
            tick=facts.tick,
        )
        change = f"{loss} {learned.before:.4g} → {learned.after:.4g} in {self.steps} steps"
        if not learned.after < learned.before:
            edit.note(f"training found nothing better: {change}")
            return
        nodes = [n for n in edit.nodes if edit.param_of(n) in learned.values]
        edit.spend(f"trained with the others: {change}", *nodes)
        for node in nodes:
            edit.set_param(node, learned.values[str(edit.param_of(node))])
