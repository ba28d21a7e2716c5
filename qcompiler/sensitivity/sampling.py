"""Running a metric over data: as long as it is not sure, and no longer than the data last.

It ends when half of the columns are known to `precision` (standard error over mean), or when every
batch was drawn from `rounds` times. What was drawn is kept as it comes: a killed run goes on, and
the same question asked again costs no run at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qcompiler.errors import BadInput
from qcompiler.keep import Keep
from qcompiler.samples import Flat
from qcompiler.sensitivity.base import Metric, Sensitivity
from qcompiler.sensitivity.pairs import shrunk
from qcompiler.sensitivity.study import Study

PRECISION = 0.05
ROUNDS = 4
EVERY = 5.0
"""Seconds between two times at which what was drawn is written down."""

Tick = Callable[[int, int], None]


def measure(
    study: Study,
    metric: Metric,
    batches: Sequence[Flat],
    *,
    precision: float = PRECISION,
    rounds: int = ROUNDS,
    pairs: bool = False,
    keep: Keep | None = None,
    tick: Tick = lambda done, total: None,
) -> Sensitivity:
    """What each column of `study` costs by `metric`, with `pairs` also what two of them cost beyond
    both, if the metric can tell; `keep` is a folder for this very question."""
    if not batches:
        raise BadInput("the calibration data is empty; expected at least one batch of inputs")
    total = len(batches) * (rounds if metric.random else 1)
    drawn, known, before = _read(keep)
    done, written, start = known, time.monotonic(), time.perf_counter()
    while not _ends(metric, drawn, done, total, precision):
        new = metric.sample(study, batches[done % len(batches)], done).detach()
        _check(study, new)
        drawn = torch.cat([drawn, new]) if len(drawn) else new
        done += 1
        tick(done, total)
        if keep is not None and time.monotonic() - written > EVERY:
            _write(keep, drawn, done, before + time.perf_counter() - start)
            written = time.monotonic()
    seconds = before + time.perf_counter() - start
    if keep is not None and done > known:
        _write(keep, drawn, done, seconds)
    means, errors = _moments(metric, drawn)
    return Sensitivity(
        str(metric),
        dict(zip(study.columns, means.tolist(), strict=True)),
        dict(zip(study.columns, errors.tolist(), strict=True)),
        len(drawn),
        done - known,
        seconds,
        shrunk(drawn, [site for site, _ in study.columns]) if pairs and metric.roots else None,
    )


def _ends(metric: Metric, drawn: Tensor, done: int, total: int, precision: float) -> bool:
    return done >= total or (done >= 2 and _sure(metric, drawn, precision))


def _moments(metric: Metric, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error of each column; an error of 0 where one draw says it all."""
    losses = drawn.square() if metric.roots else drawn
    if len(losses) < 2:
        return losses.mean(0), torch.zeros(losses.shape[1])
    return losses.mean(0), losses.std(0) / len(losses) ** 0.5


def _sure(metric: Metric, drawn: Tensor, precision: float) -> bool:
    means, errors = _moments(metric, drawn)
    felt = means > 0
    return not bool(felt.any()) or float((errors / means)[felt].median()) <= precision


def _check(study: Study, new: Tensor) -> None:
    bad = (~new.isfinite()).any(0).nonzero().flatten().tolist()
    if bad:
        id, scheme = study.columns[bad[0]]
        raise BadInput(
            f"the sensitivity of {id} to {scheme} is NaN or infinite; look for such values in the "
            "data, or for a format that cannot hold this weight"
        )


def _write(keep: Keep, drawn: Tensor, done: int, seconds: float) -> None:
    keep.save("samples", {"samples": drawn}, {"done": done, "seconds": seconds})


def _read(keep: Keep | None) -> tuple[Tensor, int, float]:
    kept = keep.load("samples") if keep is not None else None
    if kept is None:
        return torch.empty(0), 0, 0.0
    tensors, about = kept
    assert isinstance(about, dict)
    return tensors["samples"], int(about["done"]), float(about["seconds"])
