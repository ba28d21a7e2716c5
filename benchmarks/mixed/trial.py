"""One model with the formats to choose from: plans for it, and what an assignment really loses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from accuracy.cases import Case, flat

from qcompiler.allocate import Allocation, Budget, Problem, solve
from qcompiler.pipeline import run_pipeline
from qcompiler.planning.make import make_plan
from qcompiler.planning.planned import Planned
from qcompiler.planning.question import METRIC, Question
from qcompiler.program import Program
from qcompiler.registry import get_backend, get_metric, make_passes
from qcompiler.rounded import rounded_program
from qcompiler.samples import Flat
from qcompiler.sensitivity import Study
from qcompiler.sensitivity.outputs import Rounded

Row = dict[str, object]
Choice = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Trial:
    """A model and `formats`."""

    case: Case
    formats: tuple[str, ...]
    gptq: bool
    """Measure whole plans and single formats with GPTQ too."""
    add: Callable[[Row], None]
    """Takes each row as it comes."""
    _known: dict[tuple[Choice, str], Row] = field(default_factory=dict)

    @cached_property
    def program(self) -> Program:
        return run_pipeline(self.case.program, make_passes("canonicalize{optional=true}"))

    @cached_property
    def plan(self) -> Planned:
        """The default metric's, for a budget that anything fits."""
        return self.planned(METRIC)

    def planned(self, metric: str, pairs: bool = False) -> Planned:
        question = Question(
            (Budget.parse("32bits"),),
            formats=self.formats,
            metric=get_metric(metric),
            pairs=pairs,
            timed=False,
        )
        found = make_plan(self.program, self.case.observed, get_backend("reference"), question)
        print(f"{self.case.name} {metric}: {found.sensitivity.seconds:.0f} s", flush=True)
        return found

    def best(self, limit: float) -> Allocation:
        """The plan within so many bytes of weights."""
        return solve(within(self.plan, limit))

    def given(self, choice: Choice) -> Allocation:
        """A choice of someone else."""
        problem = self.plan.problem
        totals = {name: problem.total(name, choice) for name in problem.costs}
        return Allocation(choice, self.plan.loss(choice), totals, (), False, 0.0)

    def bytes(self, bits: float) -> float:
        """Of all weights, at so many bits each."""
        return bits * self.plan.weights / 8

    def row(self, budget: str, what: str, found: Allocation, *, gptq: bool = False) -> Row:
        """Measure an assignment and add its row."""
        bits = found.totals["weight_bytes"] * 8 / self.plan.weights
        row: Row = {"model": self.case.name, "budget": budget, "what": what, "bits": bits}
        row |= {"predicted": found.loss} | self.measured(found.choice, "nearest")
        if gptq and self.gptq:
            row["gptq"] = self.measured(found.choice, "gptq")["loss"]
        print(f"{self.case.name} {budget} {what}: {bits:.3f} bits, {row['loss']:.3g}", flush=True)
        self.add(row)
        return row

    def measured(self, choice: Choice, rounding: str) -> Row:
        """Loss on inputs that no metric has seen, and the model's own figure."""
        key = (choice, rounding)
        if key not in self._known:
            chosen = replace(self.plan, allocation=self.given(choice)).chosen
            run = Rounded(self._study, chosen).run_on
            if rounding != "nearest":
                observed = self.case.observed
                run = rounded_program(self.program, chosen, observed, rounding).flat
            value, extra = self.case.measure(run)
            self._known[key] = {"loss": self._loss(run), self.case.metric: value} | extra
        return self._known[key]

    @torch.no_grad()
    def _loss(self, run: Callable[[Flat], tuple[object, ...]]) -> float:
        """KL of the words, relative squared error of anything else; mean over batches."""
        losses = [
            float(self._study.compare(batch, self.program.flat(batch), run(batch)))
            for batch in self._unseen
        ]
        return sum(losses) / len(losses)

    @cached_property
    def _study(self) -> Study:
        return Study(self.program, self.plan.units.schemes)

    @cached_property
    def _unseen(self) -> list[Flat]:
        return flat(self.case.program, self.case.heldout)


def within(plan: Planned, limit: float) -> Problem:
    """The problem of a plan with so many bytes of weights as the only budget."""
    return replace(plan.problem, budgets={"weight_bytes": limit})
