"""`Planned`: a plan with all that it was chosen from, and its reasons in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qcompiler.allocate import Allocation, Problem
from qcompiler.formats import Scheme
from qcompiler.planning.file import Choice, PlanFile, scheme_texts
from qcompiler.planning.question import Question
from qcompiler.planning.reasons import why
from qcompiler.planning.units import Units, scheme_of
from qcompiler.sensitivity import Sensitivity

NOTICED = 1.03
"""Of float's seconds: above, a plan is called slower."""
Pairs = Mapping[tuple[int, int], NDArray[np.float64]]
"""Places of two sites → (candidates of the first, candidates of the second)."""


@dataclass(frozen=True)
class Uniform:
    """One format everywhere."""

    choice: tuple[int, ...]
    loss: float
    totals: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Planned:
    """What was asked, what was measured, what was chosen."""

    question: Question
    units: Units
    sensitivity: Sensitivity
    problem: Problem
    allocation: Allocation
    pairs: Pairs
    """What two sites cost beyond the sum of both, where that was counted; else empty."""
    weights: int
    """Numbers in the weights that may be rounded."""
    whole: Mapping[str, float]
    """What the float program costs, by the names of the problem's costs."""
    notes: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        return self.allocation.totals["weight_bytes"] * 8 / self.weights

    @property
    def binding(self) -> list[str]:
        """The budgets that keep a site from a better format."""
        return [str(b) for b in self.question.budgets if b.key in self.allocation.binding]

    @property
    def texts(self) -> dict[str, str]:
        """Site id → what it was given, in the words of the question."""
        return {
            name: options[k]
            for name, options, k in zip(
                self.problem.units, self.problem.options, self.allocation.choice, strict=True
            )
        }

    @property
    def chosen(self) -> dict[str, Scheme]:
        """Site id → its scheme."""
        texts = self.texts
        pairs = zip(self.units.sites, self.units.candidates, strict=True)
        return {site.id: candidates[texts[site.id]] for site, candidates in pairs}

    def uniform(self) -> dict[str, Uniform]:
        """Format → what it would be if all sites had it; formats that a site cannot have are left
        out."""
        found = {}
        for text in self.question.formats:
            places = [self._place(i, text) for i in range(len(self.problem.units))]
            if any(k is None for k in places):
                continue
            choice = tuple(k for k in places if k is not None)
            totals = {name: self.problem.total(name, choice) for name in self.problem.costs}
            found[text] = Uniform(choice, self.loss(choice), totals)
        return found

    def loss(self, choice: tuple[int, ...]) -> float:
        """Predicted loss of any choice, pairs counted as in the plan's own."""
        together = (float(m[choice[i], choice[j]]) for (i, j), m in self.pairs.items())
        return math.fsum([self.problem.loss(choice), *together])

    def _place(self, unit: int, text: str) -> int | None:
        """The candidate that `text` comes to at a site, where another text may have come first."""
        candidates = list(self.units.candidates[unit].values())
        scheme = scheme_of(self.units.sites[unit], text)
        return candidates.index(scheme) if scheme in candidates else None

    def file(self) -> PlanFile:
        """The plan as data."""
        chosen, sizes = self.chosen, self.problem.costs["weight_bytes"]
        choices = tuple(
            Choice(
                id,
                *scheme_texts(chosen[id]),
                why=self.why(i),
                loss=self.problem.losses[i][k],
                bytes=sizes[i][k],
            )
            for i, (id, k) in enumerate(
                zip(self.problem.units, self.allocation.choice, strict=True)
            )
        )
        about: dict[str, object] = {
            "budgets": [str(b) for b in self.question.budgets],
            "metric": self.sensitivity.metric,
            "bits_per_weight": self.bits_per_weight,
            "bytes": int(self.allocation.totals["bytes"]),
            "predicted_loss": self.allocation.loss,
            "binding": self.binding,
        }
        return PlanFile(choices, about)

    def why(self, unit: int) -> str:
        """The reason of a site's format, in words."""
        return why(self.problem, self.allocation, unit)

    def slower(self) -> list[str]:
        """Sentences on the phases in which the plan takes longer than float."""
        totals = self.allocation.totals
        return [
            f"smaller, but {phase} takes {totals[phase] / self.whole[phase]:.2f} × as long as in "
            f"float on this backend; add a budget such as 1x-{phase}"
            for phase in ("prefill", "decode")
            if phase in totals and totals[phase] > NOTICED * self.whole[phase]
        ]

    def with_note(self, note: str) -> Planned:
        return replace(self, notes=(*self.notes, note))
