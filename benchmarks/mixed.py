"""What mixed precision is worth at equal bytes: plans beside single formats, really measured.

    .venv/bin/python benchmarks/mixed.py [--models tiny_llama,digits_vit] [--budgets 3,3.5,4,4.5,6]
        [--metrics hessian,error] [--formats A,B] [--pairs] [--gptq] [--peers [NAMES]] [--json FILE]

Everything is rounded to nearest, so that only the assignment differs; `--gptq` adds the loss of the
plans and of the single formats with GPTQ. Loss is measured on held-out inputs: KL of the words,
relative squared error of anything else. For each model:

* each single format, and the plan for exactly its bytes;
* for budgets in bits per weight, the best single format that fits; the plan; and what other metrics
  choose with the same allocator (those are what HAWQ-V2, AutoQuantize and AutoScheme go by), the
  usual greedy descent, and with `--pairs` the plan that counts what two sites cost together;
* the choices of the peers' own code, each beside the plan for its very bytes.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from accuracy.cases import MODELS, Case, open_case
from mixed.peers import HAS, NAMES, run_chooser
from mixed.trial import Row, Trial, within
from rich.console import Console
from rich.table import Table

from qcompiler.allocate import greedy, improve, solve
from qcompiler.planning.question import METRIC
from qcompiler.planning.reasons import short
from qcompiler.planning.units import FORMATS

BUDGETS = "3,3.5,4,4.5,6"
METRICS = 'gauss_newton{by="element"},hessian,taylor,error'


def main() -> None:
    options = arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")

    for name in options.models.split(","):
        first = len(rows)
        of_model(open_case(name, options.tokens), options, add)
        show(rows[first:])


def of_model(case: Case, options: argparse.Namespace, add: Callable[[Row], None]) -> None:
    mine, budgets = tuple(options.formats.split(",")), options.budgets.split(",")
    asked = {mine, *(HAS[peer] for peer in options.peers)}
    trials = {formats: Trial(case, formats, options.gptq, add) for formats in asked}
    if not options.only_peers:
        ours(trials[mine], budgets, options.metrics.split(","), options.pairs)
    for peer in options.peers:
        run_chooser(peer, trials[HAS[peer]], budgets)


def ours(trial: Trial, budgets: list[str], metrics: list[str], pairs: bool) -> None:
    plan, others = trial.plan, {metric: trial.planned(metric) for metric in metrics}
    together = trial.planned(METRIC, pairs=True) if pairs else None
    alone = []
    for text, uniform in plan.uniform().items():
        name, size = short(text), uniform.totals["weight_bytes"]
        found = trial.given(uniform.choice)
        row = trial.row(name, f"all {name}", found, gptq=True)
        alone.append((size, float(str(row["loss"])), name, found))
        trial.row(name, "the plan for its bytes", trial.best(size), gptq=True)
    for budget in budgets:
        limit = trial.bytes(float(budget))
        if fitting := [(loss, name, found) for size, loss, name, found in alone if size <= limit]:
            _, name, found = min(fitting, key=lambda one: one[0])
            trial.row(budget, f"best single format: {name}", found, gptq=True)
        trial.row(budget, "the plan", trial.best(limit), gptq=True)
        if together is not None:
            limited = within(together, limit)
            found = improve(limited, solve(limited), together.pairs)
            trial.row(budget, "the plan with pairs", trial.given(found.choice), gptq=True)
        trial.row(budget, "greedy", greedy(within(plan, limit)))
        for metric, other in others.items():
            trial.row(budget, metric, trial.given(solve(within(other, limit)).choice))


def show(rows: list[Row]) -> None:
    table = Table(title=str(rows[0]["model"]), title_justify="left")
    figures = ["loss", "gptq", "perplexity", "cosine", "accuracy", "predicted"]
    figures = [name for name in figures if any(name in row for row in rows)]
    for name in ("budget", "assignment", "bits", *figures):
        table.add_column(name, justify="left" if name in ("budget", "assignment") else "right")
    last = None
    for row in rows:
        if row["budget"] != last:
            table.add_section()
        last = row["budget"]
        if "error" in row:
            table.add_row("", f"{row['what']}: {row['error']}")
            continue
        values = (f"{row[name]:.4g}" if name in row else "" for name in figures)
        table.add_row(str(row["budget"]), str(row["what"]), f"{row['bits']:.3f}", *values)
    Console(width=120).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    usual = ",".join(m for m in MODELS if m != "outliers")
    parser.add_argument("--models", default=usual)
    parser.add_argument("--budgets", default=BUDGETS, help="bits per weight")
    parser.add_argument("--metrics", default=METRICS, help="besides the default one")
    parser.add_argument(
        "--formats", default=",".join(FORMATS), help="of ours; peers have their own"
    )
    parser.add_argument("--tokens", type=int, default=10240, help="for perplexity")
    parser.add_argument("--pairs", action="store_true", help="plans with pairs too")
    parser.add_argument("--gptq", action="store_true", help="also round by GPTQ")
    parser.add_argument(
        *("--peers",), type=lambda text: text.split(","), nargs="?", const=[*NAMES], default=[],
        help="run these, or all: " + ", ".join(NAMES), metavar="A,B",
    )  # fmt: skip
    parser.add_argument("--only-peers", action="store_true", help="leave out all but the peers")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
