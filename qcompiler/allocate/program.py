"""Binary programs over items, by HiGHS, in numbers that its tolerances suit.

HiGHS works to absolute tolerances: 1e-6 on rows, on integers and on the gap. Each item's least loss
and cost are taken off (one candidate is taken whatever happens, so that they only shift the sums),
and each row is scaled to a largest entry in thousands: what is left is a part in 1e9 of the largest
entry, and callers check every choice against the budgets themselves.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from qcompiler.allocate.items import Floats, Ints, Items

LARGEST = 1e3
"""Of the entries of a scaled row; of the losses, ten times that."""
ENDED = (0, 2)
"""HiGHS' answers that are proofs: optimal, infeasible."""


@dataclass(frozen=True)
class Answer:
    """What HiGHS found: a candidate for each item, or None, and whether it ran to its end."""

    chosen: Ints | None
    bound: float
    finished: bool


@dataclass(frozen=True)
class Program:
    """Losses, costs and budgets of items, shifted and scaled."""

    items: Items
    loss: Floats
    scale: float
    """Of `loss` to the losses asked for."""
    shift: float
    """What all items lose at least."""
    cost: Floats
    room: Floats
    """What may be spent above the least of each item."""

    @classmethod
    def of(cls, items: Items) -> Program:
        least = items.least(items.loss)
        loss, scale = _scaled(items.loss - least[items.owner], 10 * LARGEST)
        rows, room = above_least(items)
        cost, by = (
            zip(*(_scaled(row, LARGEST) for row in rows), strict=True) if len(rows) else ((), ())
        )
        return cls(
            items,
            loss,
            scale,
            float(least.sum()),
            np.array(cost).reshape(rows.shape),
            room * np.array(by),
        )

    def unscaled(self, loss: float) -> float:
        """A sum of `loss` in the unit of the items."""
        return self.shift + loss / self.scale

    def relaxed(self) -> Floats | None:
        """What a unit of each budget is worth, λ ≥ 0, when candidates can be mixed; None when even
        then nothing is within the budgets."""
        found = linprog(
            self.loss,
            A_ub=csr_array(self.cost),
            b_ub=self.room,
            A_eq=one_each(self.items.owner, len(self.items.members)),
            b_eq=np.ones(len(self.items.members)),
            method="highs",
        )
        return None if found.x is None else np.maximum(-found.ineqlin.marginals, 0.0)

    def solve(self, free: Ints, cuts: list[Ints], tighter: float, seconds: float) -> Answer:
        """The best choice among candidates `free`, none of `cuts`, with `tighter` budgets."""
        one = one_each(self.items.owner[free], len(self.items.members))
        rules = [
            LinearConstraint(one, 1, 1),
            LinearConstraint(csr_array(self.cost[:, free]), -np.inf, self.room - tighter),
        ]
        for cut in cuts:
            rules.append(LinearConstraint(np.isin(free, cut).astype(float), -np.inf, len(cut) - 1))
        return run(self.loss[free], rules, free, self.items.owner, seconds)


def above_least(items: Items) -> tuple[Floats, Floats]:
    """Costs above the least of each item, and what the budgets leave for them."""
    least = items.least(items.cost)
    cheapest = [items.over(items.lowest(row))[m] for m, row in enumerate(items.cost)]
    return items.cost - least[:, items.owner], -np.array(cheapest, dtype=np.float64)


def run(
    loss: Floats,
    rules: list[LinearConstraint],
    free: Ints,
    owner: Ints,
    seconds: float,
) -> Answer:
    """Minimize over the candidates `free`, 0 or 1, and whatever variables ≥ 0 come after them."""
    whole = np.arange(len(loss)) < len(free)
    with _quiet():
        found = milp(
            loss,
            constraints=rules,
            integrality=whole,
            bounds=Bounds(0, np.where(whole, 1, np.inf)),
            options={"mip_rel_gap": 0, "time_limit": max(seconds, 0.01)},
        )
    bound = -np.inf if found.mip_dual_bound is None else float(found.mip_dual_bound)
    finished = found.status in ENDED
    if found.x is None:
        return Answer(None, bound, finished)
    order = np.lexsort((-found.x[whole], owner[free]))
    _, first = np.unique(owner[free][order], return_index=True)
    return Answer(free[order][first], bound, finished)


def _scaled(row: Floats, largest: float) -> tuple[Floats, float]:
    top = float(np.abs(row).max(initial=0.0))
    scale = largest / top if top > 0 else 1.0
    return row * scale, scale


def one_each(owner: Ints, items: int) -> csr_array:
    """Σ over the candidates of each item: (items, candidates)."""
    return csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), (items, len(owner)))


@contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS 1.12 prints to the process's standard output whatever its options say (its issue 2783),
    which would spoil JSON there."""
    if os.name == "nt":  # no way to the C library's buffers
        yield
        return
    sys.stdout.flush()
    flush = ctypes.CDLL(None).fflush
    flush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
