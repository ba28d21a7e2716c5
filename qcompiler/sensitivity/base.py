"""What a metric is, and what comes of it.

A metric yields samples, each a loss for every column; their mean is what it says, and their spread
how far to trust it:

    loss_c = mean_s sample_sc        standard error_c = std_s sample_sc / √samples
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qcompiler.options import Optioned
from qcompiler.samples import Flat
from qcompiler.sensitivity.study import Column, Study


@dataclass(frozen=True, kw_only=True)
class Metric(Optioned):
    """One way to tell what a scheme at a site costs the whole program."""

    what: ClassVar[str] = "metric"
    name: ClassVar[str]
    forward: ClassVar[bool] = False
    """Whether what it yields is in the units of the loss itself: nats per position for words,
    relative squared error otherwise. Others tell more from less only."""

    random: ClassVar[bool] = False
    """Whether another draw on the same batch tells something new."""

    @property
    def roots(self) -> bool:
        """Whether `sample` yields numbers whose squares are the losses: their products then tell
        what two changes at once cost beyond the sum of both."""
        return False

    @abstractmethod
    def sample(self, study: Study, batch: Flat, draw: int) -> Tensor:
        """Losses (samples, columns) of one batch, float64; `draw` seeds whatever is random."""


@dataclass(frozen=True)
class Sensitivity:
    """What each scheme at each site costs."""

    metric: str
    losses: Mapping[Column, float]
    errors: Mapping[Column, float]
    """Standard errors."""
    samples: int
    batches: int
    """Batches that were run for it in this call: 0 where all of it was known."""
    seconds: float
    """What these took."""
    pairs: Tensor | None = None
    """What two columns at once cost beyond the sum of both: (columns, columns), in the order of
    `losses`, where that was asked for and the metric can tell."""

    def loss(self, site: str, scheme: object) -> float:
        return self.losses[site, str(scheme)]
