"""What came out, as a table for each model and format."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .grid import FORMATS
from .rows import OURS, Row, best

WIDTH = 130


def show(rows: list[Row], about: dict, peer_versions: dict[str, dict[str, str]]) -> None:
    """A table for each model and format, failures below, then what it ran on."""
    console = Console(width=WIDTH)
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        for form in FORMATS:
            if group := [row for row in mine if row.format == form]:
                group.sort(key=lambda row: row.tool != OURS)
                _group(console, model, form, mine, group)
    failed: dict[str, list[str]] = {}
    for row in rows:
        if row.error:
            failed.setdefault(f"{row.tool} {row.name}: {row.error}", []).append(
                f"{row.model} {row.format}"
            )
    for text, places in failed.items():
        console.print(f"{text} ({', '.join(places)})", markup=False, highlight=False)
    settings = ", ".join(f"{k} {v}" for k, v in about["settings"].items())
    console.print(f"{settings}; {about['machine']}, threads {about['threads']}", markup=False)
    for versions in (about["versions"], *peer_versions.values()):
        console.print(", ".join(f"{p} {v}" for p, v in versions.items()), markup=False)


def _group(console: Console, model: str, form: str, mine: list[Row], group: list[Row]) -> None:
    """One table and the line that compares the best of ours with the best of the peers."""
    base = next((r for r in mine if r.format == "float" and r.tool == OURS), None)
    metric = next((row.metric for row in group if row.metric), "")
    higher = metric != "perplexity"
    title = f"{model}, {form}: {metric}"
    if base is not None:
        title += f", float {_figure(base.value, metric)}"
    table = Table(title=title, title_justify="left")
    table.add_column("tool", no_wrap=True)
    table.add_column("method", max_width=40)
    for name in (
        metric,
        "spread",
        "relative\nerror",
        "bits per\nweight",
        "whole\nmodel",
        "seconds",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    ours, theirs = (
        best((r for r in group if (r.tool == OURS) is mine_too), higher)
        for mine_too in (True, False)
    )
    for row in group:
        style = "bold" if row in (ours, theirs) else None
        error = row.extra.get("relative_error")
        cells = ["failed"] if row.error else [_figure(row.value, metric), row.spread]
        if not row.error:
            cells.append("" if error is None else f"{float(str(error)):.4f}")
            cells += [_number(row.bits_per_weight, 2), _number(row.model_bits, 2)]
            cells.append(_number(row.seconds, 1))
        table.add_row(row.tool, row.name, *cells, style=style)
    console.print(table)
    if ours is not None and theirs is not None:
        console.print(verdict(ours, theirs, higher), markup=False, highlight=False)
    console.print()


def verdict(ours: Row, theirs: Row, higher: bool) -> str:
    """`best of ours … best of the peers …`, and which of them is ahead."""
    behind = theirs.rank(higher) < ours.rank(higher)
    mark = "  <== THE PEER IS AHEAD" if behind else ""
    return f"best of ours, {_words(ours)}; best of the peers, {theirs.tool} {_words(theirs)}{mark}"


def _words(row: Row) -> str:
    error = row.extra.get("relative_error")
    off = "" if error is None else f", error {float(str(error)):.4f}"
    figure = _figure(row.value, row.metric)
    return f"{row.name}: {figure}{off} at {_number(row.bits_per_weight, 2)} bits"


def _figure(value: float | None, metric: str) -> str:
    if value is None:
        return ""
    return f"{value:.2%}" if metric == "accuracy" else f"{value:.4f}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
