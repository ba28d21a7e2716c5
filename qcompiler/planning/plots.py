"""Plots of a plan: the Pareto front, and bits by layer. Needs `pip install 'qcompiler[plot]'`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from qcompiler.allocate import front
from qcompiler.errors import BadInput, unknown
from qcompiler.keep import write_whole
from qcompiler.planning.planned import Planned
from qcompiler.planning.reasons import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 24


def plot_plan(planned: Planned, place: Path) -> None:
    """Draw `figure_of` into a file, in the format of its ending."""
    write_whole(place, drawn(planned, place.suffix.removeprefix(".")))


def drawn(planned: Planned, form: str) -> bytes:
    """`figure_of` as the bytes of a file: `png`, `svg`, `pdf`, …"""
    figure, data = figure_of(planned), io.BytesIO()
    known = figure.canvas.get_supported_filetypes()
    if form not in known:
        raise unknown("ending of a plot", form, known)
    figure.savefig(data, format=form, dpi=150)
    return data.getvalue()


def figure_of(planned: Planned) -> Figure:
    """Predicted loss over bits per weight, beside single formats; and what each site was given."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadInput("plots need matplotlib: pip install 'qcompiler[plot]'") from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curve, bars = figure.subplots(1, 2)
    scale = 8 / planned.weights
    points = [
        (a.totals["weight_bytes"] * scale, planned.loss(a.choice))
        for a in front(planned.problem, "weight_bytes", POINTS)
    ]
    points = [(bits, loss) for bits, loss in points if loss > 0]
    curve.plot(*zip(*points, strict=True), marker=".", label="mixed (Pareto front)")
    for text, alone in planned.uniform().items():
        if alone.loss > 0:
            bits = alone.totals["weight_bytes"] * scale
            curve.plot(bits, alone.loss, "x", color="tab:red")
            curve.annotate(short(text), (bits, alone.loss), fontsize=7)
    curve.plot(planned.bits_per_weight, planned.allocation.loss, "*", ms=12, label="this plan")
    curve.set(xlabel="bits per weight", ylabel="predicted loss")
    if points:
        curve.set_yscale("log")
    curve.legend()
    sizes, chosen = planned.problem.costs["weight_bytes"], planned.allocation.choice
    numbers = [s.weight.meta["val"].numel() for s in planned.units.sites]
    given = [8 * row[k] / n for row, k, n in zip(sizes, chosen, numbers, strict=True)]
    bars.bar(range(len(given)), given)
    bars.set(xlabel="site, in the graph's order", ylabel="bits per weight")
    return figure
