"""The account as one HTML file that works from disk: no script from elsewhere, no network."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from qcompiler.diff import Diff
from qcompiler.formats import QFormat
from qcompiler.history import Reason, Step
from qcompiler.show.account import Account, error_text

STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #4a86c5; --low: #d9822b }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 }
th, td { text-align: left; padding: .15rem .6rem; border-bottom: 1px solid var(--line) }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.bar { width: 16rem } td.bar div { background: var(--bar); height: .7rem; border-radius: 2px }
tr.low td.bar div { background: var(--low) }
code, td.id { font: 13px ui-monospace, monospace; overflow-wrap: anywhere }
details { margin: .4rem 0 } summary { cursor: pointer }
input { font: inherit; width: 100%; padding: .3rem .6rem; box-sizing: border-box }
svg { max-width: 100%; height: auto; background: #fff }
"""
SCRIPT = """
document.querySelector('input').addEventListener('input', event => {
  const words = event.target.value.toLowerCase()
  for (const row of document.querySelectorAll('tbody tr'))
    row.hidden = words && !row.textContent.toLowerCase().includes(words)
  if (words) document.querySelectorAll('details').forEach(d => { d.open = true })
})
"""
LOW_DB = 20.0
"""SQNR below which a row stands out: a tenth of the signal is noise."""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole file; `parts` are HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n"
        '<input placeholder="filter rows by node, reason, format …" aria-label="filter">\n'
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script></html>\n"
    )


def account_page(account: Account, title: str) -> str:
    """What each pass did, why, what it cost, what it left alone; which layers hurt; the plan."""
    steps = [
        [str(n), step.spec, step.effect or "", str(step.diff), str(len(step.skipped) or ""),
         error_text(step), f"{step.seconds:.2f}"]
        for n, step in enumerate(account.steps)
    ]  # fmt: skip
    heads = ("#", "pass", "effect", "changes", "left alone", "error", "seconds")
    parts = ["<h2>Passes</h2>", table(heads, steps, numbers=(0, 4, 6), ids=(1,))]
    if worst := _hurt(account):
        parts += ["<h2>Which layers hurt</h2>", worst]
    if plan := account.steps[-1].after.plan:
        parts += ["<h2>Formats by site</h2>", _formats(plan)]
    parts.append("<h2>What was done, and why</h2>")
    parts += [_step(n, step) for n, step in enumerate(account.steps)]
    return page(title, parts)


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Sequence[int] = (),
    ids: Sequence[int] = (),
    bars: Sequence[float] = (),
    low: Sequence[bool] = (),
) -> str:
    """A table of texts. Columns in `numbers` stand to the right, those in `ids` are code; `bars`
    are shares of 1 for a last column of bars, and rows in `low` stand out."""
    kinds = {**dict.fromkeys(numbers, "n"), **dict.fromkeys(ids, "id")}
    found = []
    for i, row in enumerate(rows):
        cells = "".join(
            f'<td class="{kinds.get(c, "")}">{escape(text)}</td>' for c, text in enumerate(row)
        )
        if bars:
            cells += f'<td class="bar"><div style="width:{100 * bars[i]:.1f}%"></div></td>'
        found.append(f'<tr class="low">{cells}</tr>' if low and low[i] else f"<tr>{cells}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in [*heads, *([""] if bars else [])])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(found)}</tbody></table>"


def _hurt(account: Account) -> str:
    """Nodes by the least SQNR that a step left them with; bars are noise, in units of the worst."""
    found = account.worst()
    values = [sqnr for sqnr, _ in found.values()]
    rows = [[id, name, f"{sqnr:.1f} dB"] for id, (sqnr, name) in found.items()]
    bars = [10 ** ((values[0] - v) / 20) if math.isfinite(v) else 0.0 for v in values]
    heads = ("node", "behind", "SQNR of its value")
    low = [v < LOW_DB for v in values]
    return table(heads, rows, numbers=(2,), ids=(0,), bars=bars, low=low) if rows else ""


def _formats(plan: Mapping[str, str]) -> str:
    """Each site with its scheme and the bits of its weight's codes, in the graph's order."""
    bits = [_bits(text) for text in plan.values()]
    top = max([8, *(b for b in bits if b is not None)])
    words = [f"{b} bits" if b is not None else "float" for b in bits]
    rows = [[id, text, word] for (id, text), word in zip(plan.items(), words, strict=True)]
    heads = ("site", "scheme", "weight")
    return table(heads, rows, numbers=(2,), ids=(0, 1), bars=[(b or top) / top for b in bits])


def _bits(scheme: str) -> int | None:
    found = re.search(r"weight=(\S+)", scheme)
    return None if found is None or found[1] == "float" else QFormat.parse(found[1]).bits


def _step(number: int, step: Step) -> str:
    parts = [_reasons("done", step.edits), _reasons("left alone", step.skipped)]
    parts += [f"<p>note: {escape(note)}</p>" for note in step.notes]
    parts.append(_changes(step.diff))
    inner = "".join(parts) or "<p>nothing</p>"
    name = f"{number} <code>{escape(step.spec)}</code> {step.effect or ''}"
    return f"<details><summary>{name}: {escape(str(step.diff))}</summary>{inner}</details>"


def _reasons(what: str, reasons: Sequence[Reason]) -> str:
    rows = [[reason.nodes[0] if reason.nodes else "", reason.why] for reason in reasons]
    return table(("node", what + ", because"), rows, ids=(0,)) if rows else ""


def _changes(diff: Diff) -> str:
    groups = {
        "added": diff.added,
        "removed": diff.removed,
        "rewired": diff.rewired,
        "parameter added": diff.params_added,
        "parameter removed": diff.params_removed,
        "parameter changed": diff.params,
    }
    rows = [[kind, id] for kind, ids in groups.items() for id in ids]
    rows += [["scheme", f"{id}: {text}"] for id, text in diff.precision.items()]
    return table(("change", "node or parameter"), rows, ids=(1,)) if rows else ""
