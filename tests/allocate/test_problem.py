"""What is no problem, and what is said of one without a solution."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qcompiler.allocate import Infeasible, Problem, cheapest, front, improve, solve
from qcompiler.errors import BadInput

PROBLEM = Problem(
    ("q", "k"),
    (("int4", "int8"), ("int8", "float")),
    ((1.0, 0.1), (0.2, 0.0)),
    {"bytes": ((4, 8), (8, 32)), "decode": ((2, 1), (2, 1))},
    {"bytes": 40},
    {"bytes": 3},
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": (("int4",),)}, "2 units and 1 options"),
        ({"options": (("int4", "int4"), ("int8", "float"))}, "candidates of q .*int4, int4"),
        ({"options": ((), ("int8", "float"))}, "candidates of q .*none"),
        ({"losses": ((1.0, 0.1),)}, "loss is given for 1 of 2 units"),
        ({"losses": ((1.0,), (0.2, 0.0))}, "q has 2 candidates and loss for 1"),
        ({"losses": ((1.0, float("nan")), (0.2, 0.0))}, "the loss of int8 at q .*nan"),
        ({"costs": {"bytes": ((4, 8), (8, float("inf")))}}, "the bytes of float at k .*inf"),
        ({"budgets": {"byte": 3}}, "unknown budget .*did you mean 'bytes'"),
        ({"fixed": {"energy": 3}}, "unknown fixed cost .*known: bytes, decode"),
        ({"budgets": {"bytes": float("inf")}}, "the budget bytes .*inf"),
        ({"groups": ((0, 2),)}, "names unit 2; there are 2"),
        ({"options": (("int4", "int8"), ("int2", "float")), "groups": ((0, 1),)}, "q, k must take"),
    ],
)
def test_what_is_no_problem(change: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        replace(PROBLEM, **change)


def test_groups_take_the_candidate_of_one_name() -> None:
    found = solve(replace(PROBLEM, groups=((0, 1),)))
    assert found.choice == (1, 0)
    assert found.totals == {"bytes": 19, "decode": 3}


def test_groups_that_overlap_are_one() -> None:
    three = Problem(
        ("q", "k", "v"),
        (("a", "b"), ("b", "a"), ("a", "c", "b")),
        ((0.0, 1.0), (1.0, 0.0), (9.0, 0.0, 1.0)),
        {},
        {},
        groups=((0, 1), (1, 2)),
    )
    assert solve(three).choice == (1, 0, 2)


def test_each_impossible_budget_says_what_is_possible() -> None:
    with pytest.raises(Infeasible) as caught:
        solve(replace(PROBLEM, budgets={"bytes": 14.5, "decode": 1.5}))
    assert "bytes: asked 14.5, at least 15 is possible here" in str(caught.value)
    assert "decode: asked 1.5, at least 2 is possible here" in str(caught.value)
    assert caught.value.asked == {"bytes": 14.5, "decode": 1.5}


def test_budgets_that_are_impossible_together_say_the_nearest() -> None:
    """Each is possible: 15 bytes, or 2 of decode, which takes 43 bytes."""
    with pytest.raises(Infeasible, match=r"not all at once; .* bytes 19 .asked 17., decode 3") as e:
        solve(replace(PROBLEM, budgets={"bytes": 17, "decode": 3}))
    assert e.value.nearest == {"bytes": 19, "decode": 3}
    assert solve(replace(PROBLEM, budgets=e.value.nearest)).optimal


def test_what_is_printed_can_be_asked_for() -> None:
    problem = Problem(("q",), (("a",),), ((0.0,),), {"s": ((1 / 3 + 1e-9,),)}, {"s": 0.1})
    with pytest.raises(Infeasible, match=r"at least 0\.333334 is possible"):
        solve(problem)
    assert solve(replace(problem, budgets={"s": 0.333334})).optimal


def test_bad_calls() -> None:
    with pytest.raises(BadInput, match="at least 2 points"):
        front(PROBLEM, "bytes", 1)
    with pytest.raises(BadInput, match="a cost is called 'loss'"):
        cheapest(replace(PROBLEM, costs={**PROBLEM.costs, "loss": PROBLEM.losses}), "bytes", 1)
    for call in (front, lambda problem, cost: cheapest(problem, cost, 1.0)):
        with pytest.raises(BadInput, match="unknown cost 'byte'; did you mean 'bytes'"):
            call(PROBLEM, "byte")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({(0, 0): np.zeros((2, 2))}, "two of 2 units; found 0 and 0"),
        ({(0, 5): np.zeros((2, 2))}, "two of 2 units; found 0 and 5"),
        ({(0, 1): np.zeros((2, 3))}, "q and k has the shape"),
        ({(0, 1): np.full((2, 2), np.nan)}, "q and k must be finite"),
    ],
)
def test_bad_pairs(pairs: dict[tuple[int, int], np.ndarray], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        improve(PROBLEM, solve(PROBLEM), pairs)
    other = replace(PROBLEM, budgets={"bytes": 15})
    with pytest.raises(BadInput, match="not within the budgets"):
        improve(other, solve(PROBLEM), {})
