"""Making a plan: measure what each format costs in accuracy, bytes and time; choose; say why.

min Σ loss_i,k y_i,k     Σ_k y_i,k = 1     Σ cost_i,k y_i,k ≤ budget, for every budget
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from qcompiler.allocate import (
    Allocation,
    Budget,
    Infeasible,
    Problem,
    bisect,
    cheapest,
    greedy,
    improve,
    solve,
)
from qcompiler.backend import Backend
from qcompiler.costs import Clock
from qcompiler.errors import BadInput
from qcompiler.formats import Scheme
from qcompiler.keep import Keep
from qcompiler.planning.costs import Costs, buildable, costs, first_of_each_weight
from qcompiler.planning.planned import Pairs, Planned
from qcompiler.planning.question import Question
from qcompiler.planning.units import Units, units
from qcompiler.program import Program
from qcompiler.rounded import rounded_program
from qcompiler.samples import Flat
from qcompiler.sensitivity import Sensitivity, Study, measure

Accept = Callable[[Program], bool]
Tell = Callable[[str, int, int], None]
"""(doing, done, of how many)"""


def make_plan(
    program: Program,
    batches: Sequence[Flat],
    backend: Backend,
    question: Question,
    *,
    accept: Accept | None = None,
    keep: Keep | None = None,
    tell: Tell = lambda doing, done, of: None,
) -> Planned:
    """The best assignment of formats within the budgets of `question`.

    With `accept` it is the smallest that this says yes to, found by bisection: it is shown the
    program, rounded to nearest as the plan says, and measures whatever it likes.

    `keep` is where sensitivities are kept: the same program, data, formats and metric again cost no
    run of the program, whatever the budgets.
    """
    if not question.budgets and question.loss is None and accept is None:
        raise BadInput("a plan needs a budget, as in 4.2bits, 60MB or 0.7x-latency")
    found = units(program, question.formats, backend, question.agree, question.include)
    clock = None
    if question.times:
        clock = Clock(
            backend,
            program,
            question.workload,
            tick=lambda done, of: tell("timing kernels", done, of),
        )
        clock.prepare({id: (Scheme(), *schemes) for id, schemes in found.schemes.items()})
        found = buildable(found, clock)
    price = costs(program, found, question.workload.fitting(program), clock)
    weights = sum(s.weight.meta["val"].numel() for s in first_of_each_weight(found.sites))
    problem = Problem(
        units=tuple(s.id for s in found.sites),
        options=tuple(tuple(c) for c in found.candidates),
        losses=tuple((0.0,) * len(c) for c in found.candidates),
        costs=price.tables,
        budgets=_limits(question.budgets, price, weights),
        fixed=price.fixed,
        groups=found.groups,
    )
    _solve(question, problem)  # what is impossible is told before anything is measured
    study = Study(program, found.schemes)
    sensitivity = measure(
        study,
        question.metric,
        batches,
        pairs=question.pairs,
        keep=None if keep is None else keep.under(question.metric, *study.columns),
        tick=lambda done, of: tell("measuring sensitivity", done, of),
    )
    losses = tuple(
        tuple(max(sensitivity.loss(s.id, scheme), 0.0) for scheme in c.values())
        for s, c in zip(found.sites, found.candidates, strict=True)
    )
    problem = replace(problem, losses=losses)
    allocation = _solve(question, problem)
    counted = question.pairs and question.loss is None and accept is None
    pairs = _pairs(found, sensitivity) if counted else {}
    if pairs:
        allocation = improve(problem, allocation, pairs)
    notes = tuple(f"{text} is left out: {why}" for text, why in found.refused.items())
    planned = Planned(
        question, found, sensitivity, problem, allocation, pairs, weights, price.whole, notes
    )
    for note in planned.slower():
        planned = planned.with_note(note)
    if accept is None:
        return planned

    def accepted(trial: Allocation) -> bool:
        chosen = replace(planned, allocation=trial).chosen
        return accept(rounded_program(program, chosen, batches))

    return replace(planned, allocation=bisect(problem, "bytes", accepted))


def _solve(question: Question, problem: Problem) -> Allocation:
    try:
        if question.loss is not None:
            return cheapest(problem, "bytes", question.loss)
        return greedy(problem) if question.solver == "greedy" else solve(problem)
    except Infeasible as error:
        raise _impossible(question.budgets, error) from error


def _limits(budgets: Sequence[Budget], price: Costs, weights: int) -> dict[str, float]:
    """Cost → the least of its budgets, in its own unit."""
    found: dict[str, float] = {}
    for budget in budgets:
        if budget.key not in price.whole:
            raise BadInput(f"{budget}: this model is not run token by token; leave it out")
        limit = budget.limit(price.whole[budget.key], weights)
        found[budget.key] = min(limit, found.get(budget.key, limit))
    return found


def _impossible(budgets: Sequence[Budget], error: Infeasible) -> BadInput:
    """The same in the words that the budgets were given in."""
    if not budgets:
        return error
    words = []
    for budget in budgets:
        asked, nearest = error.asked[budget.key], error.nearest[budget.key]
        if nearest > asked:
            amount = budget.amount * nearest / asked
            near = replace(budget, amount=math.ceil(amount * 1e4) / 1e4)
            words.append(f"{budget} is impossible here, {near} is the nearest value")
        else:
            words.append(f"{budget} can be kept")
    return BadInput(
        f"{', and '.join(words)}; ask for that, or name smaller or faster formats with --formats"
    )


def _pairs(found: Units, sensitivity: Sensitivity) -> Pairs:
    """Places of two sites → what each two of their candidates cost beyond the sum of both."""
    if sensitivity.pairs is None:
        raise BadInput(
            f"{sensitivity.metric} does not tell what two sites cost together; write "
            "--metric gauss_newton, or leave --pairs out"
        )
    sizes = [len(c) for c in found.candidates]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pairs = sensitivity.pairs.numpy()
    return {
        (i, j): pairs[starts[i] : starts[i] + sizes[i], starts[j] : starts[j] + sizes[j]]
        for i in range(len(sizes))
        for j in range(i + 1, len(sizes))
    }
