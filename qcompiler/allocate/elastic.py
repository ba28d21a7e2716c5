"""Why nothing is within the budgets, and which budgets could be kept instead.

Each budget is first held against the least that its cost can be at all. The others may then be in
each other's way; the elastic program

    min Σ_m e_m   so that   cost_m(y) ≤ budget_m + |budget_m|·e_m,   e ≥ 0

finds the choice of least relative excess, whose totals are budgets that can be kept together.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_array

from qcompiler.allocate.items import Ints, Items
from qcompiler.allocate.problem import Infeasible
from qcompiler.allocate.program import LARGEST, above_least, one_each, run
from qcompiler.errors import BadInput

SECONDS = 20.0
DIGITS = 6


def infeasible(items: Items) -> Infeasible:
    """The error for a problem without a choice within its budgets."""
    problem = items.problem
    asked = dict(problem.budgets)
    least = {
        key: problem.total(key, items.choice(items.lowest(row)))
        for key, row in zip(asked, items.cost, strict=True)
    }
    floors = {key: max(limit, least[key]) for key, limit in asked.items()}
    choice = items.choice(_elastic(replace(items, problem=replace(problem, budgets=floors))))
    nearest = {key: max(limit, problem.total(key, choice)) for key, limit in floors.items()}
    alone = [
        f"{key}: asked {limit:.{DIGITS}g}, at least {_up(least[key])} is possible here"
        for key, limit in asked.items()
        if least[key] > limit
    ]
    message = "; ".join(alone)
    if nearest != floors or not alone:
        values = ", ".join(
            f"{key} {_up(value)} (asked {asked[key]:.{DIGITS}g})" for key, value in nearest.items()
        )
        between = "each budget can be kept but not all at once"
        message = f"{message or between}; the nearest that can be kept together: {values}"
    return Infeasible(f"nothing is within the budgets: {message}", asked=asked, nearest=nearest)


def _elastic(items: Items) -> Ints:
    """The choice of least relative excess over the budgets."""
    cost, room = above_least(items)
    limits = np.array(list(items.problem.budgets.values()))
    unit = np.where(limits != 0, np.abs(limits), cost.max(axis=1, initial=0.0))
    unit = np.where(unit > 0, unit, 1.0)
    free = np.flatnonzero(items.live)
    rows = np.hstack([cost[:, free] / unit[:, None], -np.eye(len(limits)) / LARGEST])
    scale = LARGEST / np.abs(rows).max(axis=1, initial=0.0)
    one = one_each(items.owner[free], len(items.members))
    one.resize((len(items.members), len(free) + len(limits)))
    rules = [
        LinearConstraint(one, 1, 1),
        LinearConstraint(csr_array(rows * scale[:, None]), -np.inf, room / unit * scale),
    ]
    goal = np.concatenate([np.zeros(len(free)), np.ones(len(limits))])
    found = run(goal, rules, free, items.owner, SECONDS)
    if found.chosen is None:
        raise BadInput("nothing is within the budgets, and no nearest ones were found; widen them")
    return found.chosen


def _up(value: float) -> str:
    """In a few digits, rounded up, so that what is read can be asked for."""
    if value == 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(abs(value))) - DIGITS + 1)
    return f"{math.ceil(round(value / step, 6)) * step:.{DIGITS}g}"
