"""What quantization costs in accuracy at equal formats, by our methods and by the peers' own code.

    .venv/bin/python benchmarks/accuracy.py [--models outliers,minilm] [--formats w4g32-asym,w8a8]
        [--methods nearest,gptq] [--rotations none,online] [--peers [NAMES]] [--json FILE]

Models, formats and methods make a grid (`accuracy/cases.py`, `accuracy/grid.py`). Embeddings, head
and patch convolution stay float in every row, ours and theirs. Methods with random matrices run
once for each seed.

With `--json` every row is written when it is finished; the same command goes on where a killed run
stopped, `--again` measures anew. `--peers` runs other tools on the same inputs, in environments of
their own, made when they are missing. Where a method fails, its row says why.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from accuracy.cases import LLAMA_BATCHES, MODELS, Case, open_case
from accuracy.grid import FORMATS, METHODS, ROTATIONS, Cell, cells
from accuracy.ours import float_row, row_of
from accuracy.peers import NAMES, run_peer
from accuracy.rows import OURS, Key, Results
from accuracy.table import show

FULL, QUICK = (40960, 3), (10240, 1)
"""(held-out tokens of the language models, seeds)"""


def main() -> None:
    """Make what is missing, ours first, model by model; print all that there is."""
    options = arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    tokens, seeds = QUICK if options.quick else FULL
    tokens, seeds = options.tokens or tokens, options.seeds or seeds
    results = Results(options.json, about(tokens, seeds, options.threads), options.again)
    for name in options.models:
        case = open_case(name, tokens)
        if not results.has((OURS, name, "float", "float", "none")):
            results.add(float_row(case))
        grid = cells(options.formats, options.methods, options.rotations, case.keep)
        make_ours(case, [c for c in grid if not results.has(key(case, c))], seeds, results)
        for peer in options.peers or ():
            run_peer(peer, case, options.formats, seeds, options.slow, results)
    shown = [
        r
        for r in results.rows
        if r.model in options.models and r.format in ("float", *options.formats)
    ]
    show(shown, results.about, results.peer_versions)


def make_ours(case: Case, missing: list[Cell], seeds: int, results: Results) -> None:
    """Run the rows that are not there, and say how far it is."""
    start = time.monotonic()
    for number, cell in enumerate(missing):
        left = time_left(case, missing[number:], results)
        place = f"[{number + 1}/{len(missing)}{left}] {case.name}"
        print(f"{place} {cell.format} {cell.method}, {cell.rotation} …", file=sys.stderr)
        row = row_of(case, cell, seeds)
        results.add(row)
        print(f"    {row.error or f'{row.value:.4f}  {row.spread}'}", file=sys.stderr)
    if missing:
        print(f"{case.name}: {time.monotonic() - start:.0f} s", file=sys.stderr)


def time_left(case: Case, cells: list[Cell], results: Results) -> str:
    """`, 3:20 left`, by what such rows took so far; nothing where none was made yet."""
    times = [results.expected(key(case, cell)) for cell in cells]
    known = [t for t in times if t is not None]
    minutes, rest = divmod(round(sum(known)), 60)
    return f", {minutes}:{rest:02} left" if known else ""


def key(case: Case, cell: Cell) -> Key:
    return OURS, case.name, cell.format, cell.method, cell.rotation


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=choice(MODELS), default=[*MODELS], metavar="A,B")
    parser.add_argument("--formats", type=choice(FORMATS), default=[*FORMATS], metavar="A,B")
    parser.add_argument("--methods", type=choice(METHODS), default=[*METHODS], metavar="A,B")
    parser.add_argument("--rotations", type=choice(ROTATIONS), default=[*ROTATIONS], metavar="A,B")
    parser.add_argument(
        *("--peers",), type=choice(NAMES), nargs="?", const=[*NAMES], metavar="A,B",
        help="run these, or all: " + ", ".join(NAMES),
    )  # fmt: skip
    parser.add_argument(
        "--slow", action="store_true", help="also the peers' methods that take minutes for a row"
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK[0]} tokens, {QUICK[1]} seed")
    parser.add_argument("--tokens", type=int, help=f"held-out tokens ({FULL[0]})")
    parser.add_argument("--seeds", type=int, help=f"seeds of random matrices ({FULL[1]})")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep rows here, and go on there")
    parser.add_argument("--again", action="store_true", help="measure rows that FILE has already")
    return parser.parse_args()


def choice(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A reader of lists with commas, of names that there are."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if wrong := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"no {wrong[0]!r}; there are {', '.join(known)}")
        return names

    return parse


def about(tokens: int, seeds: int, threads: int) -> dict[str, object]:
    """What the rows of one file have in common, and what they ran on."""
    versions = {p: version(p) for p in ("qcompiler", "torch", "transformers")}
    return {
        "settings": {"tokens": tokens, "seeds": seeds, "calibration": LLAMA_BATCHES},
        "machine": machine(),
        "threads": threads,
        "versions": {"python": platform.python_version()} | versions,
    }


def machine() -> str:
    """The processor's name where the system tells it, what torch found in it, its cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
