"""Mergeable statistics of vectors that stream by: values of tensors, each `of` some rows.

`a.merge(b)` is what one would have seen of both, so that data come in any number of batches, and
what was seen so far can be written down and read again.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

SAMPLES = 512
"""Vectors that are kept of each site's input."""
MANTISSA = 6
"""Bits of a float's mantissa that tell a histogram's bins apart: steps of 1.6 %."""


@dataclass(frozen=True, eq=False)
class Statistic(ABC):
    """Something seen of vectors (rows, channels), float32."""

    count: int
    """Vectors seen."""

    @classmethod
    @abstractmethod
    def of(cls, rows: Tensor) -> Self:
        """What there is to see in `rows` (vectors, channels), float32."""

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """What one would have seen of both."""

    def as_of(self, count: int) -> Self:
        """The same, as if it had been seen of `count` vectors."""
        return dataclasses.replace(self, count=count)

    def state(self) -> dict[str, Tensor]:
        """All of it as tensors."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return found | {"count": torch.tensor(self.count)}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self:
        """The inverse of `state`."""
        return cls(**(state | {"count": int(state["count"])}))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Range(Statistic):
    """Range and moments of each channel, float32 (channels,)."""

    minimum: Tensor
    maximum: Tensor
    mean: Tensor
    absmean: Tensor
    """Mean magnitude."""
    square: Tensor
    """Mean square: the diagonal of the Gram matrix."""

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude per channel."""
        return torch.maximum(self.minimum.abs(), self.maximum.abs())

    @property
    def low(self) -> float:
        return float(self.minimum.min())

    @property
    def high(self) -> float:
        return float(self.maximum.max())

    @classmethod
    def of(cls, rows: Tensor) -> Range:
        minimum, maximum = rows.aminmax(dim=0)
        moments = rows.mean(0), rows.abs().mean(0), rows.pow(2).mean(0)
        return cls(rows.shape[0], minimum, maximum, *moments)

    def merge(self, other: Range) -> Range:
        total = self.count + other.count
        share = other.count / total

        def both(name: str) -> Tensor:
            mine: Tensor = getattr(self, name)
            return mine.lerp(getattr(other, name), share)

        return Range(
            total,
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
            both("mean"),
            both("absmean"),
            both("square"),
        )


@dataclass(frozen=True, eq=False)
class Gram(Statistic):
    """H = (1/n) Σ x xᵀ over the vectors seen."""

    matrix: Tensor
    """float32 (channels, channels)."""

    @classmethod
    def of(cls, rows: Tensor) -> Gram:
        return cls(rows.shape[0], rows.t() @ rows / max(rows.shape[0], 1))

    def merge(self, other: Gram) -> Gram:
        total = self.count + other.count
        return Gram(total, self.matrix.lerp(other.matrix, other.count / total))


@dataclass(frozen=True, eq=False)
class Sample(Statistic):
    """Some of the vectors, each batch with its share."""

    rows: Tensor
    """float32 (vectors, channels), at most `SAMPLES`."""

    @classmethod
    def of(cls, rows: Tensor) -> Sample:
        return cls(rows.shape[0], some(rows, SAMPLES))

    def merge(self, other: Sample) -> Sample:
        seen = self.count + other.count
        share = min(SAMPLES, seen) * self.count // seen
        kept = some(self.rows, share), some(other.rows, min(SAMPLES, seen) - share)
        return Sample(seen, torch.cat(kept))


@dataclass(frozen=True, eq=False)
class Histogram(Statistic):
    """How often each number came, over all channels, by the leading bits of its float32.

    The bins are the same for all data, so that merging is exact; a bin is 1.6 % wide.
    """

    bins: Tensor
    """int64 (2^(9 + MANTISSA),): first the positive numbers in rising order, then the negative
    ones from zero down."""

    @classmethod
    def of(cls, rows: Tensor) -> Histogram:
        places = rows.contiguous().view(torch.int32).flatten() >> (23 - MANTISSA)
        places = places & (2 ** (9 + MANTISSA) - 1)
        bins = torch.bincount(places.long(), minlength=2 ** (9 + MANTISSA))
        return cls(rows.shape[0], bins)

    def merge(self, other: Histogram) -> Histogram:
        return Histogram(self.count + other.count, self.bins + other.bins)

    def as_of(self, count: int) -> Histogram:
        bins = self.bins if count == self.count else self.bins.double() * (count / self.count)
        return Histogram(count, bins.round().long())

    def values(self) -> tuple[Tensor, Tensor]:
        """(middle of each bin that was met, how often), float64, rising."""
        met = self.bins.nonzero().flatten()
        first = (met << (23 - MANTISSA)).to(torch.int32).view(torch.float32)
        last = ((met + 1) << (23 - MANTISSA)) - 1
        middle = (first.double() + last.to(torch.int32).view(torch.float32).double()) / 2
        order = middle.argsort()
        return middle[order], self.bins[met].double()[order]


S = TypeVar("S", bound=Statistic)


def evenly(parts: Sequence[S]) -> S:
    """All of `parts` merged, each counting as much as the one that saw most."""
    most = max(part.count for part in parts)
    return functools.reduce(lambda a, b: a.merge(b), (part.as_of(most) for part in parts))


def some(rows: Tensor, count: int) -> Tensor:
    """`count` rows spread evenly over all of them."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).long()]
