"""Many budgets in turn: the Pareto front, and the least budget that a real evaluation accepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from qcompiler.allocate.exact import SECONDS, cheapest, solve
from qcompiler.allocate.problem import Allocation, Problem
from qcompiler.errors import BadInput


def front(
    problem: Problem, cost: str, points: int = 20, *, seconds: float = SECONDS
) -> tuple[Allocation, ...]:
    """Optima for `points` budgets on `cost`, evenly from the least possible to where more of it
    gains nothing, without repeats: costs rise and losses fall strictly. A budget on `cost` is left
    out, the others are kept. `seconds` are for each point."""
    if points < 2:
        raise BadInput(f"a front has at least 2 points; found {points}")
    others = {key: limit for key, limit in problem.budgets.items() if key != cost}
    free = replace(problem, budgets=others)
    low, high = _ends(free, cost, seconds)
    limits = np.linspace(low.totals[cost], high.totals[cost], points)[1:-1]
    inner = [solve(limited(free, cost, float(limit)), seconds=seconds) for limit in limits]
    found = [low]
    for point in [*inner, high]:
        if point.loss < found[-1].loss:
            found.append(point)
    return tuple(found)


def bisect(
    problem: Problem,
    cost: str,
    accept: Callable[[Allocation], bool],
    steps: int = 8,
    *,
    seconds: float = SECONDS,
) -> Allocation:
    """The allocation of least budget on `cost` that `accept` says yes to, by `steps` halvings.

    `accept` evaluates for real what losses only predict; it is asked at most `steps` + 2 times and
    never twice for one choice, and taken to say yes to all that cost more than what it accepted.
    Where that does not hold, the answer is accepted all the same, but there may be a cheaper one.
    """
    low, high = _ends(problem, cost, seconds)
    if not accept(high):
        raise BadInput(
            f"not even the best allocation within the budgets, with {cost} {high.totals[cost]:.6g}"
            ", is accepted; widen a budget, or ask for less"
        )
    if low.choice == high.choice or accept(low):
        return low
    refused, best = low, high
    below = low.totals[cost]
    for _ in range(steps):
        limit = (below + best.totals[cost]) / 2
        tried = solve(limited(problem, cost, limit), seconds=seconds)
        if tried.choice != refused.choice and accept(tried):
            best = tried
        else:
            refused, below = tried, limit
    return best


def limited(problem: Problem, cost: str, limit: float) -> Problem:
    """The problem with this budget on `cost`, instead of its own."""
    budgets: Mapping[str, float] = {**problem.budgets, cost: limit}
    return replace(problem, budgets=budgets)


def _ends(problem: Problem, cost: str, seconds: float) -> tuple[Allocation, Allocation]:
    """The allocation of least cost, and the cheapest of those of least loss."""
    best = solve(problem, seconds=seconds)
    worst = sum(max(row) for row in problem.losses)
    low = cheapest(problem, cost, worst + abs(worst), seconds=seconds)
    return low, cheapest(problem, cost, best.loss, seconds=seconds)
