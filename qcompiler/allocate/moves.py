"""Local changes to a choice: down into the budgets, and to less loss within them."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from qcompiler.allocate.items import Floats, Ints, Items

NOISE = 1e-12
"""Of the losses at hand: gains below it are rounding."""


def descend(items: Items, chosen: Ints, price: Floats) -> Ints | None:
    """From `chosen`, the change of least added price per relief, until all budgets hold.

    Relief is what a change takes off what is above the budgets, each in units of what the choices
    differ in at most. None where no change of one item brings relief.
    """
    span = items.least(-items.cost).sum(1) + items.least(items.cost).sum(1)
    unit = np.where(span < 0, -span, 1.0)[:, None]
    chosen = chosen.copy()
    while ((over := items.over(chosen)[:, None]) > 0).any():
        now = chosen[items.owner]
        after = np.maximum(over + items.cost - items.cost[:, now], 0.0)
        relief = ((np.maximum(over, 0.0) - after) / unit).sum(0)
        helps = relief > NOISE
        if not helps.any():
            return None
        ratio = np.full(len(relief), np.inf)
        ratio[helps] = (price - price[now])[helps] / relief[helps]
        best = int(ratio.argmin())
        chosen[items.owner[best]] = best
    return chosen


def settle(items: Items, chosen: Ints, pairs: csr_array | None = None) -> Ints:
    """Change one item, or two at once, within the budgets until neither loses less.

    `pairs` (candidates, candidates), symmetric and zero within an item, is what two candidates lose
    together beyond their own losses.
    """
    search = _Neighbours(items, chosen.copy(), pairs)
    while any([search.improve(c) for c in search.promising()]):
        pass
    return search.chosen


class _Neighbours:
    """A choice and what each candidate would change in it."""

    def __init__(self, items: Items, chosen: Ints, pairs: csr_array | None) -> None:
        self.items, self.chosen, self.pairs = items, chosen, pairs
        top = np.abs(items.loss).max(initial=0.0)
        if pairs is not None:
            top = max(top, abs(pairs).sum(1).max(initial=0.0))
        self.least_gain = NOISE * float(top)
        self.refresh()

    def refresh(self) -> None:
        items, now = self.items, self.chosen[self.items.owner]
        loss = items.loss
        if self.pairs is not None:
            taken = np.zeros(len(loss))
            taken[self.chosen] = 1.0
            loss = loss + self.pairs @ taken
        self.change = loss - loss[now]
        self.spends = items.cost - items.cost[:, now]
        self.left = -items.over(self.chosen)

    def promising(self) -> Ints:
        """Candidates that a change may begin with: of two changes that gain, one gains alone,
        unless there are pairs."""
        found = np.argsort(self.change, kind="stable")
        return found if self.pairs is not None else found[self.change[found] < -self.least_gain]

    def improve(self, c: int) -> bool:
        """Take candidate c, alone or with the best change of another item, if that gains."""
        items = self.items
        now = self.chosen[items.owner[c]]
        if now == c:
            return False
        total = self.change[c] + self.change + self._together(c)
        total[items.owner == items.owner[c]] = np.inf
        total[now] = self.change[c]  # which is c alone
        room = (self.left - self.spends[:, c])[:, None]
        total[~(self.spends <= room).all(0)] = np.inf
        other = int(total.argmin())
        return bool(total[other] < -self.least_gain) and self._move(other, c)

    def _together(self, c: int) -> Floats | float:
        """What each candidate loses together with c beyond what both change alone."""
        if self.pairs is None:
            return 0.0
        before = self.chosen[self.items.owner[c]]
        row: Floats = (self.pairs[[c]] - self.pairs[[before]]).toarray()[0]
        return row - row[self.chosen[self.items.owner]]

    def _move(self, *candidates: int) -> bool:
        after = self.chosen.copy()
        for c in candidates:
            after[self.items.owner[c]] = c
        if not self.items.problem.fits(self.items.choice(after)):
            return False
        self.chosen = after
        self.refresh()
        return True
