"""What mixed precision is worth at equal bytes: plans beside single formats, really measured.

    .venv/bin/python benchmarks/mixed.py [--models tiny_llama,digits_vit] [--budgets 3,3.5,4,4.5,6]
        [--metrics gauss_newton,error] [--json FILE]

Everything is rounded to nearest, so that only the assignment differs. Loss is measured on held-out
inputs: KL of the words, relative squared error of anything else. For each model:

* each single format, and the plan for exactly its bytes;
* plans for budgets in bits per weight, chosen by several metrics with one allocator (those are what
  HAWQ-V2, AutoQuantize and AutoScheme go by), and by the usual greedy descent.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from accuracy.cases import MODELS, Case, flat, open_case
from rich.console import Console
from rich.table import Table

from qcompiler.allocate import Allocation, Budget, greedy, improve, solve
from qcompiler.pipeline import run_pipeline
from qcompiler.planning.make import make_plan
from qcompiler.planning.planned import Planned, short
from qcompiler.planning.question import METRIC, Question
from qcompiler.registry import get_backend, get_metric, make_passes
from qcompiler.samples import Flat
from qcompiler.sensitivity import Study
from qcompiler.sensitivity.outputs import Rounded

BUDGETS = "3,3.5,4,4.5,6"
METRICS = f'{METRIC},gauss_newton{{by="element"}},hessian,taylor,error'
HELDOUT = 4
"""Batches that the loss is measured on."""
Row = dict[str, object]


def main() -> None:
    options = arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in options.models.split(","):
        rows += of_model(open_case(name, 10**9), options)
        show([r for r in rows if r["model"] == name])
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")


def of_model(case: Case, options: argparse.Namespace) -> list[Row]:
    program = run_pipeline(case.program, make_passes("canonicalize{optional=true}"))
    unseen = flat(case.program, case.heldout[:HELDOUT])
    plans = {}
    for metric in options.metrics.split(","):
        question = Question((Budget.parse("32bits"),), metric=get_metric(metric), timed=False)
        plans[metric] = make_plan(program, case.observed, get_backend("reference"), question)
        print(f"{case.name} {metric}: {plans[metric].sensitivity.seconds:.0f} s", flush=True)
    first = next(iter(plans.values()))
    if options.pairs:
        asked = Question((Budget.parse("32bits"),), timed=False, pairs=True)
        together = make_plan(program, case.observed, get_backend("reference"), asked)
    study = Study(program, first.units.schemes)
    rows: list[Row] = []

    def add(what: str, budget: str, plan: Planned, found: Allocation) -> None:
        chosen = replace(plan, allocation=found)
        loss = measured(study, chosen, unseen)
        bits = chosen.bits_per_weight
        rows.append(
            {"model": case.name, "budget": budget, "what": what, "bits": bits, "loss": loss,
             "predicted": found.loss, "optimal": found.optimal}
        )  # fmt: skip
        print(f"{case.name} {budget} {what}: {bits:.3f} bits, {loss:.3g}", flush=True)

    for text, one in first.uniform().items():
        alone = Allocation(one.choice, one.loss, one.totals, (), False, 0.0)
        add(f"all {short(text)}", short(text), first, alone)
        add("the plan for its bytes", short(text), first, within(first, one.totals["weight_bytes"]))
    for budget in options.budgets.split(","):
        limit = float(budget) * first.weights / 8
        for metric, plan in plans.items():
            add(metric, budget, plan, within(plan, limit))
        limited = replace(first.problem, budgets={"weight_bytes": limit})
        add(f"{METRIC}, greedy", budget, first, greedy(limited))
        if options.pairs:
            limited = replace(together.problem, budgets={"weight_bytes": limit})
            found = improve(limited, solve(limited), together.pairs)
            add(f"{METRIC}, pairs", budget, together, found)
    return rows


def within(plan: Planned, limit: float) -> Allocation:
    """The best within so many bytes of weights."""
    return solve(replace(plan.problem, budgets={"weight_bytes": limit}))


def measured(study: Study, plan: Planned, batches: list[Flat]) -> float:
    """The loss of a plan itself, mean over `batches`."""
    total = 0.0
    for batch in batches:
        found = Rounded(study, plan.chosen).run_on(batch)
        total += float(study.objective(study.program.flat(batch), found))
    return total / len(batches)


def show(rows: list[Row]) -> None:
    table = Table(title=str(rows[0]["model"]), title_justify="left")
    for name in ("budget", "assignment", "bits", "loss", "predicted"):
        table.add_column(name, justify="left" if name in ("budget", "assignment") else "right")
    last = None
    for row in rows:
        if row["budget"] != last:
            table.add_section()
        last = row["budget"]
        table.add_row(
            *(str(row["budget"]), str(row["what"]), f"{row['bits']:.3f}"),
            *(f"{row['loss']:.4g}", f"{row['predicted']:.4g}"),
        )
    Console(width=110).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(m for m in MODELS if m != "outliers"))
    parser.add_argument("--budgets", default=BUDGETS, help="bits per weight")
    parser.add_argument("--metrics", default=METRICS)
    parser.add_argument("--pairs", action="store_true", help="plans with pairs too (many draws)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
