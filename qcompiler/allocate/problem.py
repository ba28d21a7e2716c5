"""What is asked: one candidate for each unit, of least total loss, within all budgets.

    min Σᵢ loss[i, kᵢ]   so that   fixed_m + Σᵢ cost_m[i, kᵢ] ≤ budget_m   for every budget m

and the units of one group take the candidate of the same name. Costs and budgets are in whatever
unit the caller counts in; totals are `math.fsum`, so that no order of units changes them, and a
choice is within a budget only if its total is, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from qcompiler.errors import BadInput, unknown

Table = tuple[tuple[float, ...], ...]
"""A number for each unit and each of its candidates."""


@dataclass(frozen=True)
class Problem:
    """Losses and costs of every candidate of every unit, and what they may sum up to."""

    units: tuple[str, ...]
    options: tuple[tuple[str, ...], ...]
    """Names of the candidates of each unit."""
    losses: Table
    costs: Mapping[str, Table]
    budgets: Mapping[str, float]
    """The largest total of a cost, for each cost that has one."""
    fixed: Mapping[str, float] = field(default_factory=dict)
    """What is there whatever is chosen."""
    groups: tuple[tuple[int, ...], ...] = ()
    """Units, by number, that take the same candidate; groups that overlap are one."""

    def __post_init__(self) -> None:
        if len(self.options) != len(self.units):
            raise BadInput(f"there are {len(self.units)} units and {len(self.options)} options")
        for unit, names in zip(self.units, self.options, strict=True):
            if not names or len(set(names)) < len(names):
                listed = ", ".join(names) or "none"
                raise BadInput(f"candidates of {unit} must be some, and differ; found {listed}")
        self._check_table("loss", self.losses)
        for key, table in self.costs.items():
            self._check_table(key, table)
        for what, given in (("budget", self.budgets), ("fixed cost", self.fixed)):
            for key, value in given.items():
                if key not in self.costs:
                    raise unknown(f"{what} (costs are known for these)", key, self.costs)
                if not math.isfinite(value):
                    raise BadInput(f"the {what} {key} must be a finite number; found {value}")
        for group in self.groups:
            if bad := [i for i in group if not 0 <= i < len(self.units)]:
                raise BadInput(f"a group names unit {bad[0]}; there are {len(self.units)}")
        for members in self.together():
            self.shared(members)

    def _check_table(self, what: str, table: Table) -> None:
        if len(table) != len(self.units):
            raise BadInput(f"{what} is given for {len(table)} of {len(self.units)} units")
        for unit, names, row in zip(self.units, self.options, table, strict=True):
            if len(row) != len(names):
                raise BadInput(f"{unit} has {len(names)} candidates and {what} for {len(row)}")
            for name, value in zip(names, row, strict=True):
                if not math.isfinite(value):
                    raise BadInput(f"the {what} of {name} at {unit} must be finite; found {value}")

    def together(self) -> tuple[tuple[int, ...], ...]:
        """Units in sets that move as one, most of them alone, in order of their first."""
        sets = {i: {i} for i in range(len(self.units))}
        for group in self.groups:
            joined = set[int]().union(*(sets[i] for i in group))
            sets |= dict.fromkeys(joined, joined)
        return tuple(tuple(sorted(s)) for i, s in sets.items() if i == min(s))

    def shared(self, members: Sequence[int]) -> tuple[str, ...]:
        """Candidates that all `members` have, in the order of the first."""
        found = [n for n in self.options[members[0]] if all(n in self.options[i] for i in members)]
        if not found:
            names = ", ".join(self.units[i] for i in members)
            raise BadInput(f"{names} must take the same candidate and have none in common")
        return tuple(found)

    def loss(self, choice: Sequence[int]) -> float:
        """Total loss of a choice."""
        return math.fsum(_picked(self.losses, choice))

    def table(self, cost: str) -> Table:
        """A cost by its name."""
        if cost not in self.costs:
            raise unknown("cost", cost, self.costs)
        return self.costs[cost]

    def total(self, cost: str, choice: Sequence[int]) -> float:
        """Total of a cost, with what is fixed."""
        return math.fsum([self.fixed.get(cost, 0.0), *_picked(self.costs[cost], choice)])

    def excess(self, choice: Sequence[int]) -> dict[str, float]:
        """By how much a choice is above each budget; negative is room left."""
        return {key: self.total(key, choice) - limit for key, limit in self.budgets.items()}

    def fits(self, choice: Sequence[int]) -> bool:
        """Whether a choice is within all budgets."""
        return all(over <= 0 for over in self.excess(choice).values())


@dataclass(frozen=True)
class Allocation:
    """A choice within all budgets."""

    choice: tuple[int, ...]
    """The candidate of each unit, by number."""
    loss: float
    totals: Mapping[str, float]
    """Of each cost, with what is fixed."""
    binding: tuple[str, ...]
    """Budgets that keep units from better candidates: without it alone some single unit (or group)
    could move to one, or there is none that any could move to within it."""
    optimal: bool
    """Proved that nothing better is within the budgets."""
    bound: float
    """What the minimized sum cannot be below: the loss; of `cheapest`, the cost."""


class Infeasible(BadInput):
    """No choice is within all budgets."""

    def __init__(self, message: str, *, asked: Mapping[str, float], nearest: Mapping[str, float]):
        super().__init__(message)
        self.asked = dict(asked)
        self.nearest = dict(nearest)
        """Budgets that can be kept all at once, each as asked or the least relative excess."""


def _picked(table: Table, choice: Sequence[int]) -> Iterable[float]:
    return (row[k] for row, k in zip(table, choice, strict=True))
