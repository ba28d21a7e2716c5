"""Losses that depend on two units at once.

    loss(k) = Σᵢ loss[i, kᵢ] + Σ_(i,j) pair_ij[kᵢ, kⱼ]

Rounding one layer changes what rounding another costs (inter-layer dependencies; the cross terms
of the Hessian). The sum is no longer linear, so the optimum without pairs is where a local search
begins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from qcompiler.allocate.items import Items
from qcompiler.allocate.moves import settle
from qcompiler.allocate.problem import Allocation, Problem
from qcompiler.errors import BadInput

Pairs = Mapping[tuple[int, int], NDArray[np.float64]]
"""What two units lose together beyond their own losses: (candidates of i, candidates of j)."""


def improve(problem: Problem, allocation: Allocation, pairs: Pairs) -> Allocation:
    """Change one unit, or two at once, within all budgets until neither loses less.

    Never worse than `allocation`, and no proof of an optimum. `loss` counts the pairs, and so does
    `bound`, which adds the least that each pair can be. Groups stay together.
    """
    _check(problem, allocation, pairs)
    items = Items.of(problem)
    inside, between = _split(items, pairs)
    start = items.chosen(allocation.choice)
    found = settle(replace(items, loss=items.loss + inside), start, between)

    def loss(choice: tuple[int, ...]) -> float:
        return math.fsum(
            [problem.loss(choice)] + [float(m[choice[i], choice[j]]) for (i, j), m in pairs.items()]
        )

    if loss(items.choice(found)) >= loss(allocation.choice):
        found = start
    changed = items.allocation(found, optimal=False, bound=np.inf)
    lowest = allocation.bound + math.fsum(float(matrix.min()) for matrix in pairs.values())
    total = loss(changed.choice)
    return replace(changed, loss=total, bound=min(lowest, total))


def _check(problem: Problem, allocation: Allocation, pairs: Pairs) -> None:
    if not problem.fits(allocation.choice):
        raise BadInput("the allocation to improve is not within the budgets of this problem")
    for (i, j), matrix in pairs.items():
        if i == j or not (0 <= i < len(problem.units) and 0 <= j < len(problem.units)):
            raise BadInput(f"a pair is of two of {len(problem.units)} units; found {i} and {j}")
        shape = len(problem.options[i]), len(problem.options[j])
        names = f"{problem.units[i]} and {problem.units[j]}"
        if matrix.shape != shape:
            raise BadInput(f"the pair of {names} has the shape {shape}; found {matrix.shape}")
        if not np.isfinite(matrix).all():
            raise BadInput(f"the pair of {names} must be finite numbers")


def _split(items: Items, pairs: Pairs) -> tuple[NDArray[np.float64], csr_array]:
    """Pairs between candidates: of units of one item, which add to its loss, and of two."""
    size = len(items.owner)
    inside = np.zeros(size)
    where = {i: (item, at) for item, m in enumerate(items.members) for at, i in enumerate(m)}
    ends = [*items.starts[1:].tolist(), size]
    rows, columns, values = [], [], []
    for (i, j), matrix in pairs.items():
        (a, at), (b, bt) = where[i], where[j]
        first = np.arange(items.starts[a], ends[a])
        second = np.arange(items.starts[b], ends[b])
        mine = np.array([items.takes[c][at] for c in first])
        other = np.array([items.takes[c][bt] for c in second])
        if a == b:
            inside[first] += matrix[mine, other]
            continue
        block = matrix[np.ix_(mine, other)].ravel()
        from_, to = np.repeat(first, len(second)), np.tile(second, len(first))
        rows += [from_, to]
        columns += [to, from_]
        values += [block, block]
    if not rows:
        return inside, csr_array((size, size))
    at_ = (np.concatenate(rows), np.concatenate(columns))
    return inside, csr_array((np.concatenate(values), at_), shape=(size, size))
