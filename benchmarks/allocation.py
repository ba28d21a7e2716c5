"""Seconds of the exact allocation, and what greedy and uniform allocations lose to it.

    .venv/bin/python benchmarks/allocation.py [--units 400] [--seeds 5] [--json FILE]

Problems are drawn, six formats with three budgets: bytes as the formats have them for layers of
lognormal size, losses ∝ weights · 4^-bits times a lognormal sensitivity, and seconds that do not
follow the bytes (a 3-bit kernel unpacks, an int8 one uses the dot products of the CPU). `gap` is by
how much the loss is above that of the exact allocation; `uniform` is the best single format that
keeps to the budgets, of which there may be none. Budgets are shares of what half int4, half int6
would cost.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from qcompiler import BadInput
from qcompiler.allocate import Problem, greedy, solve

FORMATS = ("int2:group32", "int3:group64", "int4:group128", "int4:group32", "int6:group128", "int8")
BITS = np.array([2.5, 3.25, 4.125, 4.5, 6.125, 8.05])
"""Of a weight, with its share of the scales."""
LEVELS = np.array([2.0, 3.0, 4.0, 4.15, 6.0, 8.0])
"""Bits to the loss: smaller groups lose less."""
PREFILL = np.array([1.3, 1.6, 1.0, 1.1, 1.4, 0.8]) * 1e-9
DECODE = np.array([1.3, 1.5, 1.0, 1.05, 1.2, 1.0]) * 1e-10
"""Seconds for a weight of a prefill; for a byte of a decoded token."""
BUDGETS = {
    "loose": {"bytes": 1.1, "prefill": 0.85, "decode": 1.2},
    "medium": {"bytes": 1.0, "prefill": 0.92, "decode": 1.0},
    "tight": {"bytes": 0.9, "prefill": 0.95, "decode": 0.92},
}
Row = dict[str, object]


def main() -> None:
    """Solve all problems, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--units", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = [
        measure(draw(options.units, seed, shares), name, seed)
        for name, shares in BUDGETS.items()
        for seed in range(options.seeds)
    ]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows, options.units)


def draw(units: int, seed: int, shares: Mapping[str, float]) -> Problem:
    """A problem of layers in random sizes and sensitivities."""
    random = np.random.default_rng(seed)

    def noise(sigma: float) -> np.ndarray:
        return np.exp(random.normal(0, sigma, (units, len(FORMATS))))

    weights = 128 * np.ceil(np.exp(random.normal(13, 1.2, (units, 1))) / 128)
    sensitivity = weights / weights.mean() * np.exp(random.normal(0, 1.5, (units, 1)))
    stored = np.ceil(weights * BITS / 8)
    costs = {
        "bytes": stored,
        "prefill": weights * PREFILL * noise(0.05),
        "decode": stored * DECODE * noise(0.05),
    }
    half = [FORMATS.index("int4:group128"), FORMATS.index("int6:group128")]
    return Problem(
        tuple(f"layer{i}" for i in range(units)),
        (FORMATS,) * units,
        table(sensitivity * 4.0**-LEVELS * noise(0.15)),
        {key: table(cost) for key, cost in costs.items()},
        {key: float(cost[:, half].mean(1).sum()) * shares[key] for key, cost in costs.items()},
    )


def table(numbers: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, numbers.tolist()))


def measure(problem: Problem, budgets: str, seed: int) -> Row:
    """Seconds and losses of one problem."""
    start, busy = time.perf_counter(), time.process_time()
    exact = solve(problem)
    busy = time.process_time() - busy
    middle = time.perf_counter()
    quick = greedy(problem)
    end = time.perf_counter()
    uniform = uniform_loss(problem)
    return {
        "budgets": budgets,
        "seed": seed,
        "seconds": middle - start,
        "cpu_seconds": busy,
        "optimal": exact.optimal,
        "loss": exact.loss,
        "binding": exact.binding,
        "greedy_seconds": end - middle,
        "greedy_gap": quick.loss / exact.loss - 1,
        "uniform_gap": None if uniform is None else uniform / exact.loss - 1,
    }


def uniform_loss(problem: Problem) -> float | None:
    """The loss of the best single format within the budgets: all units are one group."""
    try:
        return solve(replace(problem, groups=(tuple(range(len(problem.units))),))).loss
    except BadInput:
        return None


def show(rows: list[Row], units: int) -> None:
    """The table."""
    title = f"{units} units × {len(FORMATS)} formats × 3 budgets"
    shown = Table(title=title, title_justify="left")
    for column in (
        "budgets",
        "seed",
        "exact s",
        "CPU s",
        "proved",
        "binding",
        "gap",
        "uniform",
    ):
        shown.add_column(column, justify="left" if column in ("budgets", "binding") else "right")
    for row in rows:
        gap = row["uniform_gap"]
        shown.add_row(
            row["budgets"],
            str(row["seed"]),
            f"{row['seconds']:.2f}",
            f"{row['cpu_seconds']:.2f}",
            "yes" if row["optimal"] else "no",
            ", ".join(row["binding"]),
            f"{row['greedy_gap']:.1%}",
            "none fits" if gap is None else f"{gap:.0%}",
        )
    Console(soft_wrap=True).print(shown)
    wall, busy = (max(row[key] for row in rows) for key in ("seconds", "cpu_seconds"))
    print(f"slowest exact allocation: {wall:.2f} s, {busy:.2f} s of the processor")


if __name__ == "__main__":
    main()
