"""What a compilation costs: seconds and peak memory of capture and of each pass, by depth.

    .venv/bin/python benchmarks/compile.py [--layers 2,8,32] [--recipe NAME] [--json]

Each depth runs in a process of its own, so that the peaks do not mix. Memory is the peak of
resident memory during a stage, beyond the float model itself. `growth` is the exponent p in
seconds ∝ layers^p between the last two depths: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

HIDDEN, INTERMEDIATE, VOCABULARY = 256, 704, 1024


def main() -> None:
    """Measure every depth in a child, then print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", default="2,8,32")
    parser.add_argument("--recipe", default="w8a8-static-smooth")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.recipe)))
        return
    depths = [int(n) for n in options.layers.split(",")]
    # glibc keeps freed blocks below a threshold that grows with use, and its peaks then say more of
    # the allocator than of the passes; held at its initial value, freed tensors go back at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    found = {}
    for depth in depths:
        print(f"{depth} layers …", file=sys.stderr)
        command = [sys.executable, __file__, "--child", str(depth), "--recipe", options.recipe]
        child = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        found[depth] = json.loads(child.stdout.splitlines()[-1])
    growth = {}
    if len(depths) > 1:
        small, large = depths[-2:]
        for stage, (before, _) in found[small]["stages"].items():
            after = found[large]["stages"][stage][0]
            growth[stage] = math.log(after / before) / math.log(large / small)
    if options.json:
        print(json.dumps({"recipe": options.recipe, "depths": found, "growth": growth}, indent=1))
    else:
        show(options.recipe, found, growth)


class Peak:
    """Resident memory, sampled each 5 ms; `stage` closes one stage and opens the next."""

    def __init__(self) -> None:
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._peak = self._base = self.resident()
        self._start = time.perf_counter()
        self.stages: dict[str, tuple[float, float]] = {}
        threading.Thread(target=self._sample, daemon=True).start()

    def resident(self) -> int:
        """Bytes of this process that are in memory."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * self._page

    def _sample(self) -> None:
        while True:
            self._peak = max(self._peak, self.resident())
            time.sleep(0.005)

    def stage(self, name: str) -> None:
        """End the stage `name`: its seconds, and its peak in MB over the start of everything."""
        now = time.perf_counter()
        self._peak = max(self._peak, self.resident())
        self.stages[name] = (now - self._start, (self._peak - self._base) / 1e6)
        self._start, self._peak = time.perf_counter(), self.resident()


def measure(layers: int, recipe: str) -> dict[str, object]:
    """Capture and compile one depth in this process."""
    import torch
    from models import llama, tokens

    import qcompiler
    from qcompiler.capture import Source
    from qcompiler.compiled import finish
    from qcompiler.pipeline import Progress, run_pipeline
    from qcompiler.recipe import load_recipe
    from qcompiler.registry import get_backend

    model, example = llama(HIDDEN, layers, INTERMEDIATE, VOCABULARY), tokens(VOCABULARY, 32)
    with torch.no_grad():
        model(**example)  # lazy imports and thread pools belong to no stage
        qcompiler.capture(torch.nn.Linear(4, 4), torch.zeros(2, 4))
    peak = Peak()
    program = qcompiler.capture(model, example)
    peak.stage("capture")

    def watch(progress: Progress) -> None:
        if progress.doing == "done":
            peak.stage(progress.name)

    quantized = run_pipeline(
        program, load_recipe(recipe).passes(), example=program.io.flatten((), example), watch=watch
    )
    finish(quantized, get_backend("cpu"), program, Source("module"))
    peak.stage("lower and check")
    nodes = len(program.graph.nodes)
    return {"float_mb": program.bytes / 1e6, "nodes": nodes, "stages": peak.stages}


def show(recipe: str, found: dict[int, dict], growth: dict[str, float]) -> None:
    """Print seconds and peak memory, a row for each stage."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{recipe}, Llama of hidden {HIDDEN}", title_justify="left")
    table.add_column("stage")
    for depth, row in found.items():
        table.add_column(f"{depth} layers\n{row['float_mb']:.0f} MB float", justify="right")
    table.add_column("growth", justify="right")
    stages = list(next(iter(found.values()))["stages"])
    for stage in stages:
        cells = ["{:.2f} s {:5.0f} MB".format(*row["stages"][stage]) for row in found.values()]
        table.add_row(stage, *cells, f"{growth[stage]:.2f}" if growth else "")
    totals = [sum(s for s, _ in row["stages"].values()) for row in found.values()]
    table.add_row("all", *(f"{t:.1f} s" for t in totals), "")
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    main()
