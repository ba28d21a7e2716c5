"""The best allocation, by integer programming (the general form of HAWQ-V3, Yao et al. 2021).

    min Σ loss·y   so that   Σₖ y_ik = 1,   Σ cost_m·y ≤ budget_m for every m,   y binary

First the relaxation, y in [0, 1], whose multipliers λ give a bound that holds for every choice,

    L = Σᵢ minₖ (loss + λ·cost)_ik − λ·budget  ≤  loss of any choice within the budgets,

and one for every choice with candidate k at i: L + r_ik, with r_ik what k is above the minimum at
i. Candidates whose r is above the gap between L and a choice in hand are in no better choice, so
that the program that HiGHS solves is small (the core of Pisinger 1995).
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from qcompiler.allocate.elastic import infeasible
from qcompiler.allocate.items import Ints, Items
from qcompiler.allocate.moves import descend, settle
from qcompiler.allocate.problem import Allocation, Problem
from qcompiler.allocate.program import Answer, Program
from qcompiler.errors import BadInput

SECONDS = 60.0
CUTS = 16
"""Choices that HiGHS takes for within the budgets, though they are above by a last digit, and that
are ruled out one by one; after these, budgets are made tighter instead."""
TIGHTER = 1e-6
"""Of a scaled budget, at first: what HiGHS' tolerance is."""
LOSS = "loss"
"""What the accuracy target of `cheapest` is called in its messages."""


def solve(problem: Problem, *, seconds: float = SECONDS) -> Allocation:
    """The allocation of least loss; the best found, and no `optimal`, when `seconds` are over.

    Raises `Infeasible`, with the nearest budgets, when nothing is within all of them.
    """
    return _solve(Items.of(problem), seconds)


def cheapest(problem: Problem, cost: str, loss: float, *, seconds: float = SECONDS) -> Allocation:
    """The allocation of least `cost` whose loss is at most `loss` (an accuracy target), within the
    budgets that there are; of several, that of least loss. `bound` is of the cost."""
    if LOSS in problem.costs:
        raise BadInput(f"a cost is called {LOSS!r}, which is what the target is called")
    turned = replace(
        problem,
        losses=problem.table(cost),
        costs={**problem.costs, LOSS: problem.losses},
        budgets={**problem.budgets, LOSS: loss},
    )
    least = solve(turned, seconds=seconds)
    limited = replace(problem, budgets={**problem.budgets, cost: least.totals[cost]})
    items = Items.of(limited)
    found = _solve(items, seconds, items.chosen(least.choice))
    bound = min(least.bound + problem.fixed.get(cost, 0.0), least.totals[cost])
    return replace(found, optimal=least.optimal, bound=bound)


def _solve(items: Items, seconds: float, start: Ints | None = None) -> Allocation:
    """`solve`, with a choice within the budgets if one is known."""
    until = time.monotonic() + seconds
    best = items.lowest(np.where(items.live, items.loss, np.inf))
    if items.problem.fits(items.choice(best)):
        return items.allocation(best, optimal=True, bound=np.inf)
    program = Program.of(items)
    worth = program.relaxed() if items.members else None
    if worth is None:
        raise infeasible(items)
    price = program.loss + worth @ program.cost
    least = items.least(price)
    bound = float(least.sum() - worth @ program.room)
    chosen = _best(program, descend(items, items.lowest(price), price), start)
    gap = np.inf if chosen is None else float(program.loss[chosen].sum()) - bound
    slack = TIGHTER + 1e-9 * abs(bound)
    free = np.flatnonzero(items.live & (price - least[items.owner] <= gap + slack))
    answer, proved = _within(program, free, until)
    chosen = _best(program, chosen, answer.chosen)
    if chosen is not None:
        proof = np.inf if proved else program.unscaled(max(bound, answer.bound))
        return items.allocation(chosen, optimal=proved, bound=proof)
    if proved:
        raise infeasible(items)
    raise BadInput(f"found no choice within the budgets in {seconds:g} s; widen one of them")


def _best(program: Program, *choices: Ints | None) -> Ints | None:
    """The one of least loss, after what small changes to each gain."""
    found = [settle(program.items, chosen) for chosen in choices if chosen is not None]
    return min(found, key=lambda chosen: float(program.loss[chosen].sum()), default=None)


def _within(program: Program, free: Ints, until: float) -> tuple[Answer, bool]:
    """The best choice of candidates `free`, and whether it is proved to be that (there may be
    none); with a bound for all of them."""
    cuts: list[Ints] = []
    tighter = 0.0
    bound = -np.inf
    while True:
        answer = program.solve(free, cuts, tighter, until - time.monotonic())
        if tighter == 0:
            bound = answer.bound
        found = answer.chosen
        if found is None or program.items.problem.fits(program.items.choice(found)):
            return replace(answer, bound=bound), answer.finished and tighter == 0
        if len(cuts) < CUTS:
            cuts.append(found)
        else:
            tighter = max(10 * tighter, TIGHTER)
