"""Seconds that are predicted from single sites beside those of the whole program, when it runs.

    .venv/bin/python benchmarks/latency.py [--backend cpu] [--threads 1] [--fresh] [--json FILE]

Predicted is `Clock.total`: what each site takes by itself, and the rest of the float program.
Measured are the whole programs, float and quantized in turn, in one process. Both as a ratio to
float, since the speed of a shared machine changes from minute to minute. Models are the tiny Llama
and one of hidden size 512 with random weights, prompts of 128 and of 32 tokens, and one token.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from models import llama, tokens
from rich.console import Console
from rich.table import Table

from qcompiler import Program, Scheme, capture
from qcompiler.compiled import build
from qcompiler.costs import Clock, Workload
from qcompiler.pipeline import run_pipeline
from qcompiler.registry import get_backend, make_passes
from qcompiler.rounded import rounded_program
from qcompiler.samples import synthetic_data
from qcompiler.schemes import fit
from qcompiler.sites import sites
from qcompiler.timing import floors

TINY = Path(__file__).parent.parent / "examples" / "tiny_llama" / "model"
INT8 = ("int8:channel", "int8:token:dynamic")
INT4 = ("int4:group128:mirrored", "float")
LENGTHS = (128, 32)
Row = dict[str, object]


def main() -> None:
    """Compare them, print a table or write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", nargs="+", default=["cpu", "onnxruntime"])
    parser.add_argument("--model", nargs="+", choices=("tiny", "512"), default=["tiny", "512"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="measure sites again")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for model in options.model:
        program = open_program(model)
        for name in options.backend:
            rows += compare(model, program, name, options.fresh)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)


def open_program(model: str) -> Program:
    """The float program, as passes before quantization leave it."""
    if model == "tiny":
        program = capture(TINY)
    else:
        program = capture(llama(512, 4, 1408, 4096), tokens(4096, 8))
    return run_pipeline(program, make_passes("canonicalize{optional=true}"))


def assignments(program: Program) -> dict[str, dict[str, Scheme]]:
    """Name → site id → scheme; embeddings stay in floating point."""
    linears = [s for s in sites(program.nodes) if s.kind.name == "linear"]
    return {
        "int8": {s.id: fit(s, *INT8) for s in linears},
        "int4": {s.id: fit(s, *INT4) for s in linears},
        "half int8, half int4": {
            s.id: fit(s, *(INT8 if i < len(linears) / 2 else INT4)) for i, s in enumerate(linears)
        },
        "half int8, half float": {s.id: fit(s, *INT8) for s in linears[: len(linears) // 2]},
    }


def compare(model: str, program: Program, backend: str, fresh: bool) -> list[Row]:
    """Rows of one program on one backend."""
    target = get_backend(backend)
    choices = assignments(program)
    artifacts = {"float": build(program, target)}
    for name, choice in choices.items():
        quantized = rounded_program(program, choice, list(synthetic_data(program.io)))
        artifacts[name] = build(quantized, target)
    rows: list[Row] = []
    for length in LENGTHS:
        workload = Workload(prefill=length, decode=length == LENGTHS[0])
        clock = Clock(target, program, workload, fresh=fresh)
        clock.prepare({id: [c.get(id) for c in choices.values()] for id in choices["int8"]})
        for phase in workload.phases:
            inputs = workload.inputs(program, phase)
            measured = floors({n: partial(a.run, inputs) for n, a in artifacts.items()}, seconds=1)
            plain = clock.total({}, phase)
            for name, choice in choices.items():
                predicted = clock.total(choice, phase) / plain
                ratio = measured[name] / measured["float"]
                row: Row = {"model": model, "backend": backend, "assignment": name}
                row |= {"tokens": length if phase == "prefill" else 1}
                row |= {"float_seconds": measured["float"], "predicted": predicted}
                rows.append(row | {"measured": ratio, "error": predicted / ratio - 1})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def show(rows: list[Row]) -> None:
    """The table."""
    table = Table(title="Seconds of a run, in units of float's", title_justify="left")
    for column in ("model", "backend", "assignment"):
        table.add_column(column)
    for column in ("tokens", "float ms", "predicted", "measured", "error"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            *(str(row[k]) for k in ("model", "backend", "assignment", "tokens")),
            f"{1e3 * row['float_seconds']:.2f}",  # type: ignore[operator]
            f"{row['predicted']:.3f}",
            f"{row['measured']:.3f}",
            f"{row['error']:+.1%}",
        )
    Console(soft_wrap=True, width=120).print(table)


if __name__ == "__main__":
    main()
