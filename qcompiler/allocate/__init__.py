"""Which candidate each unit takes: numbers in, choices out. Knows nothing of graphs."""

from qcompiler.allocate.budget import Budget
from qcompiler.allocate.exact import cheapest, solve
from qcompiler.allocate.front import bisect, front
from qcompiler.allocate.greedy import greedy
from qcompiler.allocate.items import dominated
from qcompiler.allocate.pairs import improve
from qcompiler.allocate.problem import Allocation, Infeasible, Problem

__all__ = [
    "Allocation",
    "Budget",
    "Infeasible",
    "Problem",
    "bisect",
    "cheapest",
    "dominated",
    "front",
    "greedy",
    "improve",
    "solve",
]
