"""Tables for a terminal. Width and colour are rich's business; what stands in them is ours."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompiler.diff import Diff
from qcompiler.history import Step
from qcompiler.program import Program, op_name
from qcompiler.show.account import Account, error_text, reasons, refusals
from qcompiler.sites import sites
from qcompiler.spaces import Member, Space

MOST = 6
"""Reasons shown per step before the rest is counted."""


def steps_table(account: Account) -> Table:
    """One row per pass: what it did and what it cost."""
    table = Table(title="passes", title_justify="left")
    for name in ("#", "pass", "effect", "changes", "skipped", "error", "seconds"):
        right = name in ("#", "skipped", "seconds")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for number, step in enumerate(account.steps):
        table.add_row(
            str(number),
            step.spec,
            step.effect or "",
            str(step.diff),
            str(len(step.skipped) or ""),
            error_text(step),
            f"{step.seconds:.2f}",
        )
    return table


def worst_rows(count: int, first: Account, second: Account | None) -> list[dict[str, str | float]]:
    """The `count` values that lost the most, of one account or of two side by side."""
    own, other = first.worst(), second.worst() if second is not None else {}
    nothing = math.inf, ""
    ids = sorted(own | other, key=lambda i: min(own.get(i, nothing)[0], other.get(i, nothing)[0]))
    return [
        {
            "node": id,
            "behind": own.get(id, other.get(id, nothing))[1],
            "sqnr_db": own.get(id, nothing)[0],
            **({"second_sqnr_db": other.get(id, nothing)[0]} if second is not None else {}),
        }
        for id in ids[:count]
    ]


def worst_table(rows: Sequence[dict[str, str | float]]) -> Table:
    """`worst_rows` for people: decibels, and whether those of the second are more."""
    table = Table(title="which values lost the most", title_justify="left")
    heads = {"node": "node", "behind": "behind", "sqnr_db": "SQNR", "second_sqnr_db": "second"}
    for key in rows[0] if rows else ("node", "behind", "sqnr_db"):
        table.add_column(heads[key], justify="right" if "sqnr" in key else "left", overflow="fold")
    for row in rows:
        cells = [_decibels(v) if isinstance(v, float) else str(v) for v in row.values()]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _decibels(value: float) -> str:
    return "" if value == math.inf else f"{value:.1f} dB"


def print_stat(console: Console, account: Account) -> None:
    """The table, then each step with its reasons, most frequent first."""
    console.print(steps_table(account))
    for number, step in enumerate(account.steps):
        if step.edits or step.skipped or step.notes:
            _print_step(console, number, step)


def _print_step(console: Console, number: int, step: Step) -> None:
    console.print(f"\n[bold]{number} {step.spec}[/bold]  {step.effect or ''}", highlight=False)
    for counted, mark in ((reasons(step), " "), (refusals(step), "-")):
        for count, text in counted[:MOST]:
            times = f"{count:>4} × " if count > 1 else "       "
            console.print(f" {mark}{times}{text}", highlight=False, markup=False)
        if len(counted) > MOST:
            console.print(f" {mark}       … and {len(counted) - MOST} other reasons", markup=False)
    for note in step.notes:
        console.print(f"  note: {note}", highlight=False, markup=False)


def print_diff(console: Console, change: Diff) -> None:
    """Every change by id, grouped by kind."""
    console.print(str(change))
    groups = {
        "+": change.added,
        "-": change.removed,
        "~": change.rewired,
        "p+": change.params_added,
        "p-": change.params_removed,
        "p~": change.params,
    }
    for mark, ids in groups.items():
        for id in ids:
            console.print(f"{mark:>3} {id}", highlight=False, markup=False)
    for id, text in change.precision.items():
        console.print(f"  q {id}: {text}", highlight=False, markup=False)


def print_program(console: Console, program: Program) -> None:
    """Operators, sites with their schemes, inputs and size."""
    console.print(repr(program), markup=False)
    for port in program.io.tensors:
        console.print(f"input {port}", highlight=False, markup=False)
    count = Counter(op_name(n.target) for n in program.graph.nodes if n.op == "call_function")
    table = Table("operator", "count", title="operators", title_justify="left")
    for name, n in count.most_common():
        table.add_row(name, str(n))
    console.print(table)
    table = Table("site", "weight", "scheme", title="sites", title_justify="left")
    for site in sites(program.graph.nodes):
        shape = "×".join(str(s) for s in site.weight.meta["val"].shape)
        table.add_row(site.id, shape, str(program.plan.get(site.id, "float")))
    console.print(table)


def print_spaces(console: Console, found: list[Space]) -> None:
    """What may be changed with what, and who forbids it elsewhere, in words."""
    for space in found:
        each = f", one for each of {' × '.join(map(str, space.maps))}" if space.maps else ""
        sides = [", ".join(_ids(m)) or "nobody" for m in (space.producers, space.consumers)]
        if not space.params:  # queries and keys
            computed = [b.node for b in space.blocked_by]
            sides = [", ".join(computed), "no weight"]
        console.print(
            f"space {space.id} ({space.kind}, {space.size} channels{each}): written by "
            f"{sides[0]}; read by {sides[1]}",
            highlight=False,
            markup=False,
        )
        for blocker in space.blocked_by[:MOST]:
            console.print(
                f"    blocked at {blocker.node}: {blocker.reason}", highlight=False, markup=False
            )
        if len(space.blocked_by) > MOST:
            console.print(f"    … and at {len(space.blocked_by) - MOST} other nodes")


def space_rows(found: list[Space]) -> list[dict[str, object]]:
    """Spaces as `--json` prints them."""
    return [
        {
            "id": s.id,
            "size": s.size,
            "kind": s.kind,
            "producers": _ids(s.producers),
            "consumers": _ids(s.consumers),
            "blocked_by": [{"node": b.node, "reason": b.reason} for b in s.blocked_by],
            "maps": list(s.maps),
        }
        for s in found
    ]


def _ids(members: Sequence[Member]) -> list[str]:
    """Names of the parameters, each once: one may take part with two of its axes."""
    return list(dict.fromkeys(m.name for m in members))
