"""What a plan is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from qcompiler.allocate import Budget
from qcompiler.costs import Workload
from qcompiler.errors import BadInput
from qcompiler.planning.units import FASTER, FORMATS
from qcompiler.registry import get_metric
from qcompiler.sensitivity import Metric

METRIC = "gauss_newton"
TIMES = ("prefill", "decode", "latency")


@dataclass(frozen=True)
class Question:
    """Budgets or a target, and what is chosen from."""

    budgets: tuple[Budget, ...] = ()
    loss: float | None = None
    """A target instead of budgets: the fewest bytes whose predicted loss is at most that."""
    formats: tuple[str, ...] = ()
    """`weight` or `weight/activation`; `float` is one of them. Empty: what is usual for these
    budgets (`units.py`)."""
    metric: Metric = field(default_factory=lambda: get_metric(METRIC))
    agree: tuple[str, ...] = ()
    """`inputs`, `joins`, patterns of ids: what must be given the same (see `units.py`)."""
    include: tuple[str, ...] = ()
    """`head`, `embedding`: what may be rounded besides."""
    pairs: bool = False
    """Count what two sites cost together beyond the sum of both."""
    workload: Workload = field(default_factory=Workload)
    timed: bool = True
    """Time the backend's kernels also where no budget is about time."""

    solver: Literal["exact", "greedy"] = "exact"
    """The best of all assignments, or what a descent from the best formats comes to."""

    def __post_init__(self) -> None:
        if not self.formats:
            object.__setattr__(self, "formats", usual(self.budgets))
        if self.budgets and self.loss is not None:
            raise BadInput("give budgets or a target for the loss, not both")
        if self.loss is not None and not self.loss > 0:
            raise BadInput(f"a target for the loss is above zero; found {self.loss}")
        if self.loss is not None and not self.metric.forward:
            raise BadInput(
                f"{self.metric} ranks formats and predicts no loss that could be a target; write "
                f"--metric {METRIC}"
            )

    @property
    def times(self) -> bool:
        """Whether kernels are to be timed."""
        return self.timed or any(b.cost in TIMES for b in self.budgets)


def usual(budgets: Sequence[Budget]) -> tuple[str, ...]:
    """What is chosen from where the user names nothing."""
    paced = any(b.cost in (*TIMES, "bitops") for b in budgets)
    return (*FORMATS, *FASTER) if paced else FORMATS
