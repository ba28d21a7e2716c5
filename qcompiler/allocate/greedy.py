"""The way down from the best candidates, one change at a time: quick, and no optimum.

What tools without a solver do (AutoQuantize's and nncf's ratios are of this kind). Changes are
never taken back, so that the last one may free far more than was needed: `solve` is better on
most problems with several budgets, and fast enough for all.
"""

from __future__ import annotations

from qcompiler.allocate.exact import solve
from qcompiler.allocate.items import Items
from qcompiler.allocate.moves import descend
from qcompiler.allocate.problem import Allocation, Problem
from qcompiler.errors import BadInput


def greedy(problem: Problem) -> Allocation:
    """Start at the best candidate everywhere, and make the change of least added loss per relief
    of violated budgets until all hold. `bound` is the sum of least losses.

    Raises `Infeasible` where nothing is within the budgets, and `BadInput` where something is but
    no single change leads there.
    """
    items = Items.of(problem)
    best = items.lowest(items.loss)
    bound = float(items.loss[best].sum())
    found = descend(items, best, items.loss)
    if found is None:
        solve(problem)
        raise BadInput("no single change leads into all budgets; use the exact allocation")
    return items.allocation(found, optimal=False, bound=bound)
