"""Give each site the format that the budgets leave for it: what `qcompiler plan` does, in a recipe.

    min Σ loss_i,k y_i,k     Σ_k y_i,k = 1     Σ cost_i,k y_i,k ≤ budget, for every budget

Losses are measured on the program as it stands here, so that rotations and scales come before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.allocate import Budget
from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.facts import Facts
from qcompiler.formats import Scheme
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.planning.make import make_plan
from qcompiler.planning.question import METRIC, Question
from qcompiler.registry import get_backend, get_metric
from qcompiler.sites import sites


@dataclass(frozen=True, kw_only=True)
class Allocate(Pass):
    """Assign the best formats within budgets, by measured sensitivity and cost."""

    name: ClassVar[str] = "allocate"
    effect: ClassVar[Effect] = Effect.PLAN
    needs: ClassVar[tuple[str, ...]] = ("batches",)
    makes: ClassVar[tuple[str, ...]] = ("plan",)

    budgets: tuple[str, ...] = ()
    """`4.2bits`, `60MB`, `0.7x-latency`, …"""
    formats: tuple[str, ...] = ()
    """`weight` or `weight/activation`; without, what is usual for the budgets."""
    metric: str = METRIC
    agree: tuple[str, ...] = ()
    """`inputs`, `joins`, or patterns of ids that are given the same."""
    include: tuple[str, ...] = ()
    """`head`, `embedding`."""
    backend: str = "reference"
    """Whose kernels there must be, and are timed if a budget is about time."""

    def run(self, edit: Edit, facts: Facts) -> None:
        if not self.budgets:
            raise BadInput("allocate needs budgets, as in allocate{budgets=[4.2bits]}")
        question = Question(
            budgets=tuple(Budget.parse(b) for b in self.budgets),
            formats=self.formats,
            metric=get_metric(self.metric),
            agree=self.agree,
            include=self.include,
            timed=False,
        )
        planned = make_plan(
            facts.program,
            facts.batches,
            get_backend(self.backend),
            question,
            keep=facts.keep,
            tell=lambda doing, done, of: facts.tick(done, of),
        )
        for note in planned.notes:
            edit.note(note)
        nodes = {s.id: s.node for s in sites(edit.nodes)}
        for unit, (id, scheme) in enumerate(planned.chosen.items()):
            if scheme == Scheme():
                edit.skip(nodes[id], planned.why(unit))
                continue
            edit.spend(planned.why(unit), nodes[id])
            edit.assign(nodes[id], scheme)
