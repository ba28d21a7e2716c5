"""Times that hold on a machine that others use too.

Whatever interrupts a run makes it longer, never shorter, and often by several times: on a busy
machine medians, and medians of ratios of runs in turn, are off by a factor of two or three, while
the fastest runs repeat within a few percent. So contenders run in turn, each until the fastest has
been seen three times; a few runs in a row, so that each finds in cache what it has left there.
Where no contender waits for another thread or a device, time is that of the calling thread, which
stands still while others have the processor: one clock for all, or a busy machine favours some.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

try:
    import resource
except ImportError:  # Windows: it does not tell
    resource = None  # type: ignore[assignment]

PRECISION = 0.02
"""How near to each other the three fastest runs of a contender are when the race ends."""
SECONDS = 0.4
"""For each contender, after which it ends anyhow."""
LEAST = 3
"""Turns at least."""
ROW, ROW_SECONDS = 8, 0.01
"""Runs in a row in each turn, unless so many seconds are over."""
FASTEST = 3


@dataclass(frozen=True)
class Sample:
    """One run."""

    wall: float
    thread: float
    """Seconds of the calling thread."""
    waited: bool
    """Whether it gave the processor away by itself."""


def floors(
    contenders: Mapping[str, Callable[[], object]],
    precision: float = PRECISION,
    seconds: float = SECONDS,
) -> dict[str, float]:
    """Seconds of each contender: the median of its three fastest runs."""
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    start, turns = time.perf_counter(), 0
    while turns < LEAST or not (
        time.perf_counter() - start > seconds * len(samples)
        or all(_settled(times, precision) for times in _fastest(samples).values())
    ):
        turns += 1
        for name, run in contenders.items():
            begun = time.perf_counter()
            for _ in range(ROW):
                samples[name].append(_sample(run))
                if time.perf_counter() - begun > ROW_SECONDS:
                    break
    return {name: statistics.median(times) for name, times in _fastest(samples).items()}


def _sample(run: Callable[[], object]) -> Sample:
    waits, wall, thread = _waits(), time.perf_counter(), time.thread_time()
    run()
    thread, wall = time.thread_time() - thread, time.perf_counter() - wall
    return Sample(wall, thread, waits is None or _waits() != waits)


def _waits() -> int | None:
    """How often this thread waited by itself; None where the system does not tell."""
    whose = getattr(resource, "RUSAGE_THREAD", None)
    return None if whose is None else resource.getrusage(whose).ru_nvcsw


def _fastest(samples: Mapping[str, list[Sample]]) -> dict[str, list[float]]:
    """Seconds of each contender's fastest runs."""
    alone = all(sum(s.waited for s in found) < len(found) / 2 for found in samples.values())
    return {
        name: sorted(s.thread if alone else s.wall for s in found)[:FASTEST]
        for name, found in samples.items()
    }


def _settled(times: list[float], precision: float) -> bool:
    return times[-1] <= (1 + precision) * times[0]
