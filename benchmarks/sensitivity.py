"""Which metric tells best what a format at one place costs: rank correlation with brute force.

    .venv/bin/python benchmarks/sensitivity.py [--models tiny_llama,digits_vit] [--metrics fisher]
        [--formats int4:group32,int8:channel/int8:token:dynamic] [--json FILE]

The truth is the loss itself (KL of the words, relative squared error of anything else) with one
format at one site, all formats at all sites, on inputs that no metric has seen. `all` ranks every
pair of a site and a format, `sites` the sites for one format, the mean over formats: what tells
"which layer hurts" from "fewer bits hurt more". `size` is the median of metric over truth: 1 where
a metric predicts the loss itself. Seconds with one thread; the truth's are its own.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import torch
from accuracy.cases import MODELS, Case, flat, open_case
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qcompiler.formats import Scheme
from qcompiler.pipeline import run_pipeline
from qcompiler.planning.units import units
from qcompiler.registry import get_backend, get_metric, make_passes
from qcompiler.sensitivity import Study, measure

FORMATS = (
    "int2:group32:mirrored",
    "int3:group32:mirrored",
    "int4:group32:mirrored",
    "int8:channel",
    "int8:channel/int4:token:dynamic",
)
METRICS = (
    "fisher",
    "hessian",
    "gauss_newton",
    'gauss_newton{by="token"}',
    'gauss_newton{by="element"}',
    "eigenvalue",
    "taylor",
    "error",
    "salience",
    "layer",
    'layer{by="outliers"}',
    "divergence",
)
HELDOUT = 2
"""Batches that the truth is measured on."""


def main() -> None:
    options = arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for name in options.models.split(","):
        rows += of_model(open_case(name, 10**9), options)
        show([r for r in rows if r["model"] == name])
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")


def of_model(case: Case, options: argparse.Namespace) -> list[dict[str, object]]:
    passes = make_passes("canonicalize{optional=true}")
    program = run_pipeline(case.program, passes)
    found = units(program, options.formats.split(","), get_backend("reference"))
    study = Study(program, found.schemes)
    start = time.perf_counter()
    unseen = flat(case.program, case.heldout[:HELDOUT])
    truth = measure(study, get_metric("divergence"), unseen)
    brute = time.perf_counter() - start
    true = torch.tensor(list(truth.losses.values()))
    rows = []
    for text in options.metrics.split(","):
        seen = measure(study, get_metric(text), case.observed)
        guess = torch.tensor(list(seen.losses.values()))
        rows.append(
            {
                "model": case.name,
                "metric": text,
                "all": spearman(guess, true),
                "sites": by_scheme(study, guess, true),
                "size": float((guess / true)[true > 0].nanmedian()),
                "seconds": seen.seconds,
                "batches": seen.batches,
                "truth_seconds": brute,
                "columns": len(true),
            }
        )
        print(f"{case.name} {text}: {rows[-1]['all']:.3f}", flush=True)
    return rows


def by_scheme(study: Study, guess: Tensor, true: Tensor) -> float:
    """Mean rank correlation over the sites of one scheme."""
    schemes: dict[str, list[int]] = {}
    for place, (_, scheme) in enumerate(study.columns):
        if scheme != str(Scheme()):
            schemes.setdefault(scheme, []).append(place)
    found = [spearman(guess[at], true[at]) for at in schemes.values() if len(at) > 2]
    return sum(found) / len(found)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation."""
    ranks = torch.stack([a, b]).argsort(1).argsort(1).double()
    return float(torch.corrcoef(ranks)[0, 1])


def show(rows: list[dict[str, object]]) -> None:
    first = rows[0]
    title = (
        f"{first['model']}: {first['columns']} pairs of a site and a format, brute force "
        f"{first['truth_seconds']:.0f} s"
    )
    table = Table(title=title, title_justify="left")
    for name in ("metric", "all", "sites", "size", "seconds", "batches"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for row in rows:
        figures = (f"{row[k]:.3f}" for k in ("all", "sites", "size"))
        table.add_row(str(row["metric"]), *figures, f"{row['seconds']:.1f}", str(row["batches"]))
    Console(width=110).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--metrics", default=",".join(METRICS))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
