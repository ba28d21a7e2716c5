"""What a plan comes to beside each single format and float, as texts for a table."""

from __future__ import annotations

from qcompiler.planning.planned import Planned
from qcompiler.planning.reasons import short, size_text
from qcompiler.schemes import FLOAT


def totals(planned: Planned) -> tuple[list[str], list[list[str]]]:
    """(heads, rows); the plan itself comes first."""
    whole, alone = planned.whole, planned.uniform().items()
    phases = [p for p in ("prefill", "decode") if p in whole]
    found = [("this plan", planned.allocation.totals, planned.allocation.loss)]
    found += [(f"all {short(t)}", u.totals, u.loss) for t, u in alone if t != FLOAT]
    found.append(("float", whole, 0.0))
    rows = [
        [
            name,
            f"{costs['weight_bytes'] * 8 / planned.weights:.2f}",
            size_text(costs["bytes"]),
            *(f"{costs[p] / whole[p]:.2f}" if whole[p] else "" for p in phases),
            f"{loss:.3g}",
        ]
        for name, costs, loss in found
    ]
    return ["", "bits per weight", "bytes", *(f"{p}, × float" for p in phases), "loss"], rows
