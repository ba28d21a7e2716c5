"""Times that hold on a machine that others use too.

Whatever interrupts a run makes it longer, never shorter, and often by several times: on a busy
machine medians, and medians of ratios of runs in turn, are off by a factor of two or three, while
the fastest runs repeat within a few percent. So contenders run in turn, each until the fastest has
been seen three times. Time is that of the calling thread, which does not pass while others have the
processor, unless some of the work is done elsewhere, so that even at best less of it passes than on
the wall.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

PRECISION = 0.02
"""How near to each other the three fastest runs of a contender are when the race ends."""
SECONDS = 0.4
"""For each contender, after which it ends anyhow."""
LEAST, WARM = 7, 2
"""Turns that count at least, and turns before them that do not."""
FASTEST = 3
OWN = 0.95
"""Part of the wall's time that is the thread's own, at best, where all work is done in it."""

Sample = tuple[float, float]
"""Seconds of (the thread, the wall)."""


def floors(
    contenders: Mapping[str, Callable[[], object]],
    precision: float = PRECISION,
    seconds: float = SECONDS,
) -> dict[str, float]:
    """Seconds of each contender: the median of its three fastest runs."""
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    start, turns = time.perf_counter(), 0
    while turns < WARM + LEAST or not (
        time.perf_counter() - start > seconds * len(samples)
        or all(_settled(_fastest(found), precision) for found in samples.values())
    ):
        turns += 1
        for name, run in contenders.items():
            sample = _sample(run)
            if turns > WARM:
                samples[name].append(sample)
    return {name: statistics.median(_fastest(found)) for name, found in samples.items()}


def _sample(run: Callable[[], object]) -> Sample:
    wall, own = time.perf_counter(), time.thread_time()
    run()
    return time.thread_time() - own, time.perf_counter() - wall


def _fastest(samples: list[Sample]) -> list[float]:
    """Seconds of the fastest runs."""
    alone = max(own / wall for own, wall in samples) >= OWN
    return sorted(own if alone else wall for own, wall in samples)[:FASTEST]


def _settled(times: list[float], precision: float) -> bool:
    return times[-1] <= (1 + precision) * times[0]
