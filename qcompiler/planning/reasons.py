"""Why a site was given its format: what that costs and saves beside the next formats."""

from __future__ import annotations

import math

from qcompiler.allocate import Allocation, Problem


def why(problem: Problem, allocation: Allocation, unit: int) -> str:
    """The choice at a site beside the best cheaper format and the next better one, in terms of the
    first budget that binds (bytes if none does)."""
    cost = allocation.binding[0] if allocation.binding else "weight_bytes"
    k, options = allocation.choice[unit], problem.options[unit]
    losses, costs = problem.losses[unit], problem.costs[cost][unit]
    total, words = allocation.loss, []
    others = [j for j in range(len(options)) if j != k]
    cheaper = [j for j in others if costs[j] < costs[k] and losses[j] >= losses[k]]
    better = [j for j in others if costs[j] > costs[k] and losses[j] < losses[k]]
    kept = [j for j in others if costs[j] <= costs[k] and losses[j] < losses[k]]
    if cheaper:
        j = min(cheaper, key=lambda j: (losses[j], -costs[j]))
        saved = losses[j] - losses[k]
        words.append(
            f"costs {amount(cost, costs[k] - costs[j])} more than {short(options[j])}, saves "
            f"{_share(saved, total + saved)} of the total predicted loss"
        )
    if better:
        j = min(better, key=lambda j: (costs[j], losses[j]))
        words.append(
            f"{short(options[j])} would cost {amount(cost, costs[j] - costs[k])} more and save "
            f"{_share(losses[k] - losses[j], total)}"
        )
    if kept:
        j = min(kept, key=lambda j: losses[j])
        why_not = "other budgets, pairs or sites that must agree keep it"
        words.append(f"{short(options[j])} would cost no more and lose less, but {why_not} away")
    if not words:
        words.append("no other is cheaper or loses less" if others else "the only candidate")
    return f"{short(options[k])}: {'; '.join(words)}"


def amount(cost: str, value: float) -> str:
    """`1.2 MB`, `0.31 ms of prefill`, `2.1 Gbitops`."""
    if cost in ("bytes", "weight_bytes"):
        return size_text(value)
    if cost == "bitops":
        return f"{_thousands(value)}bitops"
    size, unit = (1e3, "ms") if abs(value) >= 1e-4 else (1e6, "µs")
    return f"{value * size:.3g} {unit} of {cost}"


def size_text(count: float) -> str:
    """`1.2 MB`, thousands as in files."""
    return f"{_thousands(count)}B" if abs(count) >= 1e3 else f"{count:.0f} bytes"


def short(text: str) -> str:
    """A format without how its scales are stored."""
    return text.replace(":scale(fp16)", "").replace(":mirrored", "")


def _thousands(value: float) -> str:
    """`1.2 M`, for a unit to follow."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g} "


def _share(part: float, whole: float) -> str:
    return f"{part / whole if whole and math.isfinite(whole) else 0.0:.1%}"
