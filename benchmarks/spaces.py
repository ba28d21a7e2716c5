"""What the channel-space analysis costs: seconds for each kind of map, and of rotating and folding.

    .venv/bin/python benchmarks/spaces.py [--layers 2,8,32,128] [--json]

A Llama of hidden 128: the analysis reads axes, so that it costs the same at any width; folding
reads the weights too. `per 1,000 nodes` is at the largest depth, `growth` the exponent p in
seconds ∝ layers^p between the last two depths: 1 is linear. The pipeline's checks, which
`compile.py` counts, are left out here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable

import torch
from models import llama, tokens
from rich.console import Console
from rich.table import Table

import qcompiler
from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.pipeline import run_pipeline
from qcompiler.program import Program
from qcompiler.registry import get_pass, make_passes
from qcompiler.spaces import KINDS, find

PREPARE = "canonicalize,absorb_norms"
HIDDEN, INTERMEDIATE, VOCABULARY = 128, 256, 128


def main() -> None:
    """Measure every depth, then print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", default="2,8,32,128")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    depths = [int(n) for n in options.layers.split(",")]
    found = {}
    for depth in depths:
        print(f"{depth} layers …", file=sys.stderr)
        found[depth] = measure(depth)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


def measure(layers: int) -> dict[str, float]:
    """Nodes and seconds at one depth; the best of three for what takes no time."""
    model, example = llama(HIDDEN, layers, INTERMEDIATE, VOCABULARY), tokens(VOCABULARY, 16)
    program = qcompiler.capture(model, example)
    program = run_pipeline(program, make_passes(PREPARE))
    row: dict[str, float] = {"nodes": len(program.graph.nodes)}
    for kind in KINDS:
        row[kind] = timed(lambda kind=kind: find(program, kind))
    row["rotate"] = timed(lambda: apply(program, "rotate"))
    rotated = apply(program, "rotate")
    row["fold"] = timed(lambda: apply(rotated, "fold"))
    return row


def timed(work: Callable[[], object]) -> float:
    """Seconds of the fastest of three runs."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def apply(program: Program, name: str) -> Program:
    """One pass without its checks."""
    edit = Edit(program, name)
    get_pass(name).make({}).run(edit, Facts(program))
    return edit.seal()[0]


def show(found: dict[int, dict[str, float]]) -> None:
    """Print seconds, a row for each stage."""
    table = Table(title=f"Llama of hidden {HIDDEN}", title_justify="left")
    table.add_column("stage")
    for depth, row in found.items():
        table.add_column(f"{depth} layers\n{row['nodes']:,.0f} nodes", justify="right")
    table.add_column("per 1,000 nodes", justify="right")
    table.add_column("growth", justify="right")
    (small, before), (large, after) = (
        list(found.items())[-2:] if len(found) > 1 else [*found.items()] * 2
    )
    for stage in after:
        if stage == "nodes":
            continue
        cells = [f"{row[stage]:.2f} s" for row in found.values()]
        rate = f"{1000 * after[stage] / after['nodes']:.2f} s"
        growth = (
            math.log(after[stage] / before[stage]) / math.log(large / small)
            if large != small
            else 0.0
        )
        table.add_row(stage, *cells, rate, f"{growth:.2f}" if growth else "")
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    main()
