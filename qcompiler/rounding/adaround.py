"""AdaRound: each weight becomes the number below it or the one above, whichever serves the outputs.

    W' = v_k + h(V) (v_k+1 - v_k)        v_k ≤ W < v_k+1, the neighbours on the grid
    h(V) = clip(σ(V) (ζ - γ) + γ, 0, 1)        ζ = 1.1, γ = -0.1
    loss + λ Σ (1 - |2 h(V) - 1|^β)        β from 20 to 2, after a fifth of the steps without it

(Nagel et al. 2020, Up or down? Adaptive rounding for post-training quantization, eq. 21-25.) V
starts where h is the fraction that rounding cuts off, and in the end h ≥ ½ goes up. The loss is
taken in units of nearest's, so that λ means the same for every layer. Any format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qcompiler.formats import Grid, QTensor
from qcompiler.rounding.ladder import Ladder
from qcompiler.rounding.learned import Learned, Student
from qcompiler.rounding.objectives import Name
from qcompiler.rounding.search import By

ZETA, GAMMA = 1.1, -0.1
FIRST, LAST = 20.0, 2.0
"""β before and after."""


@dataclass(frozen=True, kw_only=True)
class AdaRound(Learned):
    """Up or down for each weight, by a soft choice that hardens."""

    name: ClassVar[str] = "adaround"

    steps: int = 300
    objective: Name = "layer"
    search: By = "output"
    harden: float = 100.0
    """λ, over the mean of all weights."""
    warmup: float = 0.2
    """Share of the steps without it."""

    @property
    def own_rate(self) -> float:
        """What crosses h a dozen times in all, but no more in a step than noise allows."""
        return min(0.3, 100 / self.steps)

    def student(self, weight: Tensor, grid: Grid) -> Student:
        return _Student(weight, grid, self.harden, self.warmup)


class _Student(Student):
    def __init__(self, weight: Tensor, grid: Grid, harden: float, warmup: float) -> None:
        self._harden, self._warmup = harden, warmup
        self._ladder = ladder = Ladder(grid, tuple(weight.shape))
        place = ladder.position(weight)
        self._below = place.floor().clamp(0, ladder.last - 1)
        self._start = ladder.number(self._below)
        self._step = ladder.number(self._below + 1) - self._start
        fraction = (place - self._below).clamp(0, 1)
        share = (fraction - GAMMA) / (ZETA - GAMMA)
        self._v = (share / (1 - share)).log().requires_grad_()
        self.leaves = (self._v,)

    def weight(self) -> Tensor:
        return self._start + self._up() * self._step

    def rounded(self) -> QTensor:
        return self._ladder.hold(self._below + (self._up() >= 0.5))

    def penalty(self, done: float) -> Tensor | None:
        if done < self._warmup:
            return None
        # β falls by a cosine: for the first steps almost only what is undecided is pushed.
        way = (done - self._warmup) / (1 - self._warmup)
        power = LAST + 0.5 * (FIRST - LAST) * (1 + math.cos(math.pi * way))
        return self._harden * (1 - (2 * self._up() - 1).abs().pow(power)).sum()

    def _up(self) -> Tensor:
        """h(V)."""
        return (self._v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
