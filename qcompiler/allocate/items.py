"""A problem as arrays: groups merged into items, candidates of all items in one list.

Candidate c belongs to item `owner[c]`; a choice is one candidate for each item. An item offers what
all its units have, at the sum of their losses and costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qcompiler.allocate.problem import Allocation, Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Items:
    """All candidates of all items."""

    problem: Problem
    members: tuple[tuple[int, ...], ...]
    """Units of each item."""
    takes: tuple[tuple[int, ...], ...]
    """What each candidate is, by number, at each unit of its item."""
    owner: Ints
    starts: Ints
    """The first candidate of each item."""
    loss: Floats
    cost: Floats
    """(budgets, candidates)"""

    @classmethod
    def of(cls, problem: Problem) -> Items:
        members, keys = problem.together(), list(problem.budgets)
        names = [problem.shared(units) for units in members]
        takes = [
            tuple(problem.options[i].index(name) for i in units)
            for units, offered in zip(members, names, strict=True)
            for name in offered
        ]
        counts = np.array([len(offered) for offered in names], dtype=np.intp)
        owner = np.repeat(np.arange(len(members), dtype=np.intp), counts)
        tables = [problem.losses, *(problem.costs[key] for key in keys)]
        sums = [
            [
                math.fsum(table[i][k] for i, k in zip(members[item], take, strict=True))
                for item, take in zip(owner, takes, strict=True)
            ]
            for table in tables
        ]
        found = np.array(sums, dtype=np.float64).reshape(len(tables), len(takes))
        starts = np.cumsum(counts) - counts
        return cls(problem, members, tuple(takes), owner, starts, found[0], found[1:])

    def choice(self, chosen: Ints) -> tuple[int, ...]:
        """The candidate of each unit, from that of each item."""
        found = [0] * len(self.problem.units)
        for units, c in zip(self.members, chosen, strict=True):
            for i, k in zip(units, self.takes[c], strict=True):
                found[i] = k
        return tuple(found)

    def chosen(self, choice: Sequence[int]) -> Ints:
        """The inverse of `choice`."""
        where = {
            (o, take): c for c, (o, take) in enumerate(zip(self.owner, self.takes, strict=True))
        }
        picks = [tuple(choice[i] for i in units) for units in self.members]
        return np.array([where[item, pick] for item, pick in enumerate(picks)], dtype=np.intp)

    def over(self, chosen: Ints) -> Floats:
        """By how much a choice is above each budget."""
        return np.array(list(self.problem.excess(self.choice(chosen)).values()), dtype=np.float64)

    def lowest(self, values: Floats) -> Ints:
        """The candidate of least value of each item."""
        least = self.least(values)[self.owner]
        order = np.flatnonzero(values == least)
        return order[np.unique(self.owner[order], return_index=True)[1]]

    def least(self, values: Floats) -> Floats:
        """The least value of each item: (…, items) of (…, candidates)."""
        if not len(self.starts):
            return values
        found: Floats = np.minimum.reduceat(values, self.starts, axis=-1)
        return found

    @cached_property
    def live(self) -> Bools:
        """Candidates that some optimum may take: not `dominated` within their item."""
        ends = [*self.starts[1:], len(self.owner)]
        found = [
            ~dominated(self.loss[a:b], self.cost[:, a:b])
            for a, b in zip(self.starts, ends, strict=False)
        ]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.bool_)

    def allocation(self, chosen: Ints, *, optimal: bool, bound: float) -> Allocation:
        """The choice with all that is known of it."""
        choice, problem = self.choice(chosen), self.problem
        totals = {key: problem.total(key, choice) for key in problem.costs}
        loss = problem.loss(choice)
        return Allocation(choice, loss, totals, self._binding(chosen), optimal, min(bound, loss))

    def _binding(self, chosen: Ints) -> tuple[str, ...]:
        now = chosen[self.owner]
        better = self.loss < self.loss[now]
        if not better.any():
            return ()
        after = (self.cost - self.cost[:, now])[:, better]
        broken = self.over(chosen)[:, None] + after > 0
        alone = (broken & (broken.sum(0) == 1)).any(1)
        binds = alone | broken.all(1)
        return tuple(key for key, b in zip(self.problem.budgets, binds, strict=True) if b)


def dominated(losses: Floats, costs: Floats) -> Bools:
    """Which candidates have another of no more loss and no more of any cost: of equals, all but
    the first. `losses` (candidates), `costs` (costs, candidates)."""
    rows = np.vstack([losses, costs])
    as_good = (rows[:, :, None] <= rows[:, None, :]).all(0)
    first = np.arange(len(losses))[:, None] < np.arange(len(losses))
    return np.asarray((as_good & (~as_good.T | first)).any(0), dtype=np.bool_)
