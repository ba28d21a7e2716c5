"""`qcompiler plan`: what each weight should be stored in, for budgets, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click
from rich.table import Table

from qcompiler.allocate import Budget
from qcompiler.cli_shared import calibration, progress, with_data
from qcompiler.console import as_json, err, out, print_json
from qcompiler.costs import Workload
from qcompiler.keep import check_file, write_whole
from qcompiler.planning.front import BEFORE, plan
from qcompiler.planning.page import plan_page
from qcompiler.planning.planned import Planned
from qcompiler.planning.plots import plot_plan
from qcompiler.planning.question import METRIC, Question
from qcompiler.planning.totals import totals
from qcompiler.registry import get_metric

MOST = 12
"""Choices that are shown on a terminal."""


@click.command("plan")
@click.argument("model")
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    help="4.2bits, 60MB, 0.7x-latency, 12ms-decode, 0.5x-bitops; any number of them.",
)
@click.option("--loss", type=float, help="Instead of budgets: the predicted loss that is allowed.")
@click.option("-o", "--output", required=True, type=Path, help="TOML file to write.")
@with_data
@click.option(
    "--formats",
    help="weight or weight/activation, with commas; else what is usual for the budgets.",
)
@click.option("--metric", default=METRIC, show_default=True, help="See `qcompiler metrics`.")
@click.option("--backend", default="cpu", show_default=True)
@click.option("--passes", default=BEFORE, show_default=True, help="What comes before.")
@click.option(
    "--agree", multiple=True, help="inputs, joins, or a pattern: sites that are given the same."
)
@click.option(
    "--include", multiple=True, type=click.Choice(["head", "embedding"]), help="Round these too."
)
@click.option("--pairs", is_flag=True, help="Count what two sites cost together.")
@click.option(
    "--solver", type=click.Choice(["exact", "greedy"]), default="exact", show_default=True
)
@click.option("--batch", default=1, show_default=True, help="Sequences at a time.")
@click.option("--prefill", default=128, show_default=True, help="Tokens of a prompt.")
@click.option("--no-decode", is_flag=True, help="The model is never run token by token.")
@click.option("--no-time", is_flag=True, help="Leave the kernels untimed where no budget asks.")
@click.option("--plot", type=Path, help="Draw the Pareto front and the bits by layer (PNG, SVG).")
@click.option("--html", type=Path, help="All of it as a page that works from disk.")
@as_json
def plan_(
    model: str,
    budgets: tuple[str, ...],
    loss: float | None,
    output: Path,
    data: Path | None,
    batches: int,
    formats: str | None,
    metric: str,
    backend: str,
    passes: str,
    agree: tuple[str, ...],
    include: tuple[str, ...],
    pairs: bool,
    solver: Literal["exact", "greedy"],
    batch: int,
    prefill: int,
    no_decode: bool,
    no_time: bool,
    plot: Path | None,
    html: Path | None,
    json_: bool,
) -> None:
    """Choose the format of each weight of MODEL within budgets, and write the plan to a file.

    `qcompiler compile MODEL --plan FILE` then makes the model of it. Sensitivities and times are
    kept in the user's cache folder: another budget costs no run of the model.
    """
    for place in (output, plot, html):
        if place is not None:
            check_file(place)
    question = Question(
        budgets=tuple(Budget.parse(b) for b in budgets),
        loss=loss,
        formats=tuple(f.strip() for f in formats.split(",")) if formats else (),
        metric=get_metric(metric),
        agree=agree,
        include=include,
        pairs=pairs,
        solver=solver,
        workload=Workload(batch, prefill, not no_decode),
        timed=not no_time,
    )
    feed = calibration(model, data, batches)
    with progress(json_) as watch:
        planned = plan(
            model, question=question, data=feed, backend=backend, passes=passes, watch=watch
        )
    planned.file().write(output)
    if plot is not None:
        plot_plan(planned, plot)
    if html is not None:
        write_whole(html, plan_page(planned, f"A plan for {model}"))
    if json_:
        print_json(as_row(planned))
        return
    _print(planned)
    out.print(f"written to {output}; use it with: qcompiler compile {model} --plan {output} -o OUT")


def as_row(planned: Planned) -> dict[str, object]:
    """The plan for programs to read."""
    uniform = planned.uniform()
    return {
        "bits_per_weight": planned.bits_per_weight,
        "bytes": int(planned.allocation.totals["bytes"]),
        "predicted_loss": planned.allocation.loss,
        "uniform": {text: u.loss for text, u in uniform.items()},
        "binding": planned.binding,
        "choices": {c.site: c.scheme for c in planned.file().choices},
        "why": {c.site: c.why for c in planned.file().choices},
        "totals": dict(planned.allocation.totals),
        "float": dict(planned.whole),
        "uniform_totals": {text: dict(u.totals) for text, u in uniform.items()},
        "optimal": planned.allocation.optimal,
        "metric": planned.sensitivity.metric,
        "samples": planned.sensitivity.samples,
        "batches_run": planned.sensitivity.batches,
        "notes": list(planned.notes),
    }


def _print(planned: Planned) -> None:
    heads, rows = totals(planned)
    table = Table(title="plan", title_justify="left")
    for name in heads:
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    for number, row in enumerate(rows):
        table.add_row(*row, style=None if number else "bold")
    out.print(table)
    out.print(f"what binds: {', '.join(planned.binding) or 'nothing'}")
    losses = sorted(planned.file().choices, key=lambda c: -c.loss)
    for choice in losses[:MOST]:
        out.print(f"  {choice.site}: {choice.why}", markup=False, highlight=False)
    if len(losses) > MOST:
        out.print(f"  … and {len(losses) - MOST} sites of less loss, in the file")
    for note in planned.notes:
        err.print(f"note: {note}", markup=False, highlight=False)
