"""One linear layer: our kernels beside those of other libraries, in turn on the same input.

    .venv/bin/python benchmarks/linear.py [--shapes 4096x4096,2048x5632] [--tokens 1,4,16,64,256]
                                          [--threads 1,2] [--only NAME,…] [--json FILE]

All contenders run in turn: a slow moment of a shared machine hits all alike. Between two the
threads of the first are given time to fall asleep; then each runs once to wake its own. What is
timed is a call on each of so many copies of the layer that they fill the caches twice over: every
weight comes from memory and the code is at hand, as in a model. The figure is the median of
float32's seconds over theirs. `error` is the relative error against float64 on the float weights,
mostly that of the format; for ours `kernel` is the one against float64 on the rounded numbers. GB/s
are bytes of weights over seconds at one token, beside what a sum over memory reaches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from linear_peers import BITS, PEERS, Run
from rich.console import Console
from rich.table import Table
from run import machine
from torch import Tensor

from qcompiler.backends.cpu.kernels import KERNELS, Static
from qcompiler.check import relative_error
from qcompiler.formats import QFormat
from qcompiler.formats.grid import Grid
from qcompiler.rounding import nearest

OURS = {
    "ours W4A8 g32": ("int4:group32:mirrored:scale(fp16)", "int8:token:dynamic"),
    "ours W4A8 g128": ("int4:group128:mirrored:scale(fp16)", "int8:token:dynamic"),
    "ours W8A8": ("int8:channel", "int8:token:dynamic"),
    "ours W2A8 g32": ("int2:group32:asym:scale(fp16)", "int8:token:dynamic"),
    "ours W3A8 g32": ("int3:group32:scale(fp16)", "int8:token:dynamic"),
    "ours W4A32 g128": ("int4:group128:mirrored:scale(fp16)", "float"),
    "ours W8A32": ("int8:channel", "float"),
}
"""Name → formats of weight and activation."""
COLD = 2**26
"""Bytes of weights that a contender goes through; more than the caches hold."""
ASLEEP = 0.02
"""Seconds after which a library's threads have stopped waiting for work busily."""


def main() -> None:
    """Race all contenders at each shape, length and number of threads."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--shapes", default="2048x2048,4096x4096,4096x11008,11008x4096", help="INxOUT,…"
    )
    parser.add_argument("--tokens", default="1,4,16,64,256")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--only", default="", help="contenders whose names contain one of these")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict] = []
    with torch.no_grad():
        for threads in map(int, options.threads.split(",")):
            torch.set_num_threads(threads)
            reach = bandwidth()
            for shape in options.shapes.split(","):
                width, out = map(int, shape.split("x"))
                contenders = build(out, width, threads, options.only.split(","))
                for tokens in map(int, options.tokens.split(",")):
                    rows += race(contenders, out, width, tokens, threads, options.rounds)
                mine = [r for r in rows if (r["shape"], r["threads"]) == (shape, threads)]
                show(mine, shape, threads, reach)
                if options.json:
                    found = {"machine": machine(), "torch": torch.__version__, "rows": rows}
                    options.json.write_text(json.dumps(found, indent=1))


class Contender:
    """Copies of a linear layer that run."""

    def __init__(
        self, runs: list[Run], bytes: int = 0, rounded: tuple[Tensor, str] | None = None
    ) -> None:
        self.runs, self.bytes, self.rounded = runs, bytes, rounded

    def seconds(self, x: Tensor) -> float:
        """Of one call."""
        self.runs[-1](x)
        start = time.perf_counter()
        for run in self.runs:
            run(x)
        return (time.perf_counter() - start) / len(self.runs)


def copies(weight: Tensor, bits: float) -> int:
    return max(1, -(-COLD * 8 // int(weight.numel() * bits)))


def build(out: int, width: int, threads: int, only: list[str]) -> dict[str, Contender]:
    """All that can be built here; what cannot is named with the reason."""
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    found = {}
    for name in (*PEERS, *OURS):
        if name != "torch float32" and not any(part in name for part in only):
            continue
        try:
            found[name] = ours(weight, *OURS[name]) if name in OURS else peer(name, weight, threads)
            for run in found[name].runs:
                run(torch.randn(2, width))
        except Exception as error:  # a peer's failure is a result, not the end of the benchmark
            if name in OURS:
                raise
            found.pop(name, None)
            why = (str(error).strip() or repr(error)).splitlines()[0][:160]
            print(f"{name} is missing: {type(error).__name__}: {why}", file=sys.stderr)
    return found


def peer(name: str, weight: Tensor, threads: int) -> Contender:
    """Another library's."""
    count = copies(weight, BITS[name])
    return Contender([PEERS[name](weight.clone(), threads) for _ in range(count)])


def ours(weight: Tensor, stored: str, activation: str) -> Contender:
    """One of our kernels."""
    q = nearest(weight, QFormat.parse(stored))
    fmt = None if activation == "float" else QFormat.parse(activation)
    kernel = KERNELS["decoding" if fmt is None else "integer"]
    calls = [kernel.prepare(q, None, fmt, Static()) for _ in range(copies(weight, q.format.bits))]
    tensors = [t for t in calls[0].parameters.values() if t is not None]
    size = sum(t.numel() * t.element_size() for t in tensors)
    return Contender(list(calls), size, (q.dequantize(torch.float64), activation))


def race(
    contenders: dict[str, Contender], out: int, width: int, tokens: int, threads: int, rounds: int
) -> list[dict]:
    """A row for each contender."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            time.sleep(ASLEEP)
            seconds = contender.seconds(x)
            if turn:  # the first one is for warming up
                times[name].append(seconds)
    exact = x.double() @ weight_of(out, width).t()
    base = times["torch float32"]
    rows = []
    for name, contender in contenders.items():
        seconds = statistics.median(times[name])
        ratio = statistics.median(b / t for b, t in zip(base, times[name], strict=True))
        rows.append(
            {
                "contender": name,
                "shape": f"{width}x{out}",
                "tokens": tokens,
                "threads": threads,
                "seconds": seconds,
                "against_float32": ratio,
                "gb_per_s": contender.bytes / seconds / 1e9,
                "error": relative_error(exact, contender.runs[0](x).double()),
                "kernel_error": own_error(contender, x),
            }
        )
    return rows


def weight_of(out: int, width: int) -> Tensor:
    """The weight in float64."""
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    return weight.double()


def own_error(contender: Contender, x: Tensor) -> float | None:
    """Relative error of our kernel against float64 on the numbers that it multiplies."""
    if contender.rounded is None:
        return None
    weight, activation = contender.rounded
    if activation != "float":
        grid = Grid.fit(x, QFormat.parse(activation))
        x = grid.decode(grid.codes(x), torch.float64)
    return relative_error(x.double() @ weight.t(), contender.runs[0](x.float()).double())


def bandwidth() -> float:
    """Bytes per second of reading memory once: the best of a few sums over 512 MiB."""
    data, best = torch.ones(2**27), 1e9
    for _ in range(8):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.numel() * 4 / best


def show(rows: list[dict], shape: str, threads: int, reach: float) -> None:
    """A table of ratios, a column for each number of tokens; the best of each is marked."""
    columns = list(dict.fromkeys(r["tokens"] for r in rows))
    table = Table(
        title=f"{shape} (in × out), {threads} threads, {machine()}, memory {reach / 1e9:.0f} GB/s:"
        " times torch float32 (more is faster)",
        title_justify="left",
    )
    table.add_column("contender", no_wrap=True)
    for tokens in columns:
        table.add_column(str(tokens), justify="right")
    for name in ("GB/s at 1", "error", "kernel"):
        table.add_column(name, justify="right")
    best = {t: max(r["against_float32"] for r in rows if r["tokens"] == t) for t in columns}
    for name in dict.fromkeys(r["contender"] for r in rows):
        mine = {r["tokens"]: r for r in rows if r["contender"] == name}
        cells = [
            f"{mine[t]['against_float32']:.2f}"
            + ("*" if mine[t]["against_float32"] == best[t] else "")
            for t in columns
        ]
        first = mine[columns[0]]
        speed = f"{first['gb_per_s']:.1f}" if first["gb_per_s"] and columns[0] == 1 else ""
        kernel = [r["kernel_error"] for r in mine.values() if r["kernel_error"] is not None]
        error = max(r["error"] for r in mine.values())
        table.add_row(name, *cells, speed, f"{error:.1e}", f"{max(kernel):.0e}" if kernel else "")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
