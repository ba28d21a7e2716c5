"""GPTQ's seconds for a layer beside llm-compressor's own, on the same weights, Hessians, scales.

    .venv/bin/python benchmarks/gptq.py [--threads 1] [--rounds 3] [--order static|none] [--json]

Timed is what finds the codes, factoring the Hessian included: ours is `factor` and `gptq`, theirs
`quantize_weight`. Each layer has processes of its own, ours and theirs in turn, so that a slow
moment of a shared machine hits both; figures are the best of all rounds. `error` is tr(E H Eᵀ) in
units of that of rounding to nearest. `peak` is the largest resident set of the process above that
of the process for the smallest layer, so that what the libraries take is left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from peers.environment import HERE, Unavailable, python_of
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from qcompiler import Grid, QFormat
from qcompiler.rounding.gptq import factor, gptq

PEER = HERE / "gptq_speed_llmcompressor.py"
FORMATS = {"group128": "int4:group128:full", "channel": "int4:channel:full"}
RUNS = 5
Row = dict[str, object]


def main() -> None:
    """Race all layers, print a table or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each, in turn")
    parser.add_argument("--order", choices=("static", "none"), default="static")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--layer", nargs=2, metavar=("FILE", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.layer:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(*options.layer, options.order == "static")))
        return
    try:
        python = python_of("llmcompressor")
    except Unavailable as error:
        sys.exit(str(error))
    with tempfile.TemporaryDirectory() as folder:
        rows = race(Path(folder), python, options)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        show(rows)


def measure(file: str, name: str, order: bool) -> list[Row]:
    """Our figures for one layer of `file` in each format."""
    tensors = load_file(file)
    weight, hessian = tensors[f"{name}.weight"], tensors[f"{name}.hessian"]
    rows: list[Row] = []
    for form, text in FORMATS.items():
        grid = Grid.fit(weight, QFormat.parse(text))
        times = []
        for _ in range(RUNS + 1):
            start = time.perf_counter()
            found = factor(hessian, order=order)
            assert found is not None
            rounded = gptq(weight, found, grid)
            times.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        error, nearest = (
            float((off @ hessian.double() * off).sum())
            for off in (
                (weight - value).double() for value in (rounded.dequantize(), grid.round(weight))
            )
        )
        rows.append(
            {"format": form, "seconds": median(times[1:]), "error": error, "nearest": nearest}
            | {"peak_rss_mb": peak * (1 if sys.platform == "darwin" else 1024) / 1e6}
        )
    return rows


def race(folder: Path, python: Path, options: argparse.Namespace) -> list[Row]:
    """Rows by layer and format, of both."""
    layers, result = folder / "layers.safetensors", folder / "result.safetensors"
    common = ["--order", options.order, "--threads", str(options.threads)]
    peer = [str(python), str(PEER), str(layers), str(result), *common]
    call([*peer, "--make", "--only", "none"])
    names = sorted(
        (n.removesuffix(".weight") for n in load_file(layers) if n.endswith(".weight")),
        key=lambda name: [int(size) for size in name.split("x")],
    )
    rows: list[Row] = []
    for name in names:
        ours: list[list[Row]] = []
        theirs: list[list[Row]] = []
        for _ in range(options.rounds):
            me = [sys.executable, __file__, "--layer", str(layers), name, *common]
            ours.append(json.loads(call(me)))
            theirs.append(json.loads(call([*peer, "--only", name]))["rows"])
        for i, form in enumerate(FORMATS):
            row: Row = {"layer": name, "format": form, "threads": options.threads}
            for who, found in (("ours", ours), ("theirs", theirs)):
                mine = [r[i] for r in found]
                assert {r["format"] for r in mine} == {form}
                row |= {
                    f"{who}_seconds": min(r["seconds"] for r in mine),
                    f"{who}_error": mine[0]["error"] / ours[0][i]["nearest"],
                    f"{who}_peak_mb": min(r["peak_rss_mb"] for r in mine),
                }
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    for who in ("ours", "theirs"):
        least = min(row[f"{who}_peak_mb"] for row in rows)
        for row in rows:
            row[f"{who}_peak_mb"] -= least
    return rows


def call(command: list[str]) -> str:
    """What a process prints; its own messages only if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def show(rows: list[Row]) -> None:
    """The table."""
    table = Table(title="GPTQ, ours | llm-compressor's", title_justify="left")
    for column in ("layer", "format", "seconds", "faster", "error", "peak MB"):
        table.add_column(column, justify="left" if column in ("layer", "format") else "right")
    for row in rows:
        mine, peer = row["ours_seconds"], row["theirs_seconds"]
        table.add_row(
            row["layer"],
            row["format"],
            f"{mine:.4f} | {peer:.4f}",
            f"{peer / mine:.1f} ×",
            f"{row['ours_error']:.4f} | {row['theirs_error']:.4f}",
            f"{row['ours_peak_mb']:.0f} | {row['theirs_peak_mb']:.0f}",
        )
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    main()
