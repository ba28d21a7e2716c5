"""A plan as one HTML file: what it comes to beside single formats, each choice and its reason."""

from __future__ import annotations

from html import escape

from qcompiler.errors import BadInput
from qcompiler.planning.planned import Planned
from qcompiler.planning.plots import drawn
from qcompiler.planning.reasons import size_text
from qcompiler.planning.totals import totals
from qcompiler.show.page import page, table


def plan_page(planned: Planned, title: str) -> str:
    """The whole page; with the plots if matplotlib is there."""
    heads, rows = totals(planned)
    parts = [
        f"<p>what binds: {', '.join(planned.binding) or 'nothing'}</p>",
        table(heads, rows, numbers=range(1, len(heads))),
    ]
    parts += [f"<p>note: {escape(note)}</p>" for note in planned.notes]
    return page(title, [*parts, _plots(planned), "<h2>Choices</h2>", _choices(planned)])


def _plots(planned: Planned) -> str:
    try:
        text = drawn(planned, "svg").decode()
    except BadInput as error:  # there is no matplotlib: the tables say the same
        return f"<p>{escape(str(error))}</p>"
    return text[text.index("<svg") :]


def _choices(planned: Planned) -> str:
    choices = planned.file().choices
    top = max((c.loss for c in choices), default=0.0)
    rows = [[c.site, c.why, f"{c.loss:.3g}", size_text(c.bytes)] for c in choices]
    bars = [c.loss / top if top else 0.0 for c in choices]
    heads = ("site", "format, because", "predicted loss", "bytes")
    return table(heads, rows, numbers=(2, 3), ids=(0,), bars=bars)
