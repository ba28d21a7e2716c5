"""The account of a compilation: what each pass did, why, what it cost, what it skipped."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from qcompiler.diff import Diff, Snapshot, diff
from qcompiler.errors import BadInput, unknown
from qcompiler.history import Step


@dataclass(frozen=True)
class Account:
    """A readable view of a history. `str()` is the table; see also `show` and `why`."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        rows = [("#", "pass", "effect", "changes", "skipped", "error", "seconds")]
        for number, step in enumerate(self.steps):
            rows.append(
                (
                    str(number),
                    step.spec,
                    step.effect or "",
                    str(step.diff),
                    str(len(step.skipped) or ""),
                    error_text(step),
                    f"{step.seconds:.2f}",
                )
            )
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        )

    def html(self, title: str = "What qcompiler did") -> str:
        """All of it as one page that works from disk."""
        from qcompiler.show.page import account_page

        return account_page(self, title)

    def rows(self) -> list[dict[str, object]]:
        """One dictionary per step, as `--json` prints it."""
        return [step_row(s) for s in self.steps]

    def between(self, first: int, second: int) -> Diff:
        """What differs between the programs behind two steps."""
        return diff(self.at(first), self.at(second))

    def at(self, number: int) -> Snapshot:
        """The program behind a step, summed up."""
        if not 0 <= number < len(self.steps):
            raise BadInput(f"there is no step {number}; steps are 0 to {len(self.steps) - 1}")
        return self.steps[number].after

    def find(self, id: str) -> list[int]:
        """Numbers of the steps behind which the node or parameter `id` exists."""
        found = [n for n, s in enumerate(self.steps) if id in s.after.nodes or id in s.after.params]
        if not found:
            everything = {i for s in self.steps for i in (*s.after.nodes, *s.after.params)}
            inside = sorted(i for i in self.steps[-1].after.nodes if i.startswith(f"{id}/"))
            if inside:
                raise BadInput(f"{id!r} is a module; its nodes are {', '.join(inside[:8])}")
            raise unknown("node", id, everything)
        return found

    def show(self, id: str) -> list[tuple[int, str, str]]:
        """(step, pass, text) for each step that made, changed or removed `id`."""
        self.find(id)
        lines: list[tuple[int, str, str]] = []
        before = None
        for number, step in enumerate(self.steps):
            now = describe(step.after, id)
            if now != before:
                lines.append((number, step.name, now or "(gone)"))
            before = now
        return lines

    def why(self, id: str) -> list[tuple[int, str, str]]:
        """(step, pass, reason) for each edit or refusal about `id`, or about what it replaces."""
        self.find(id)
        related = {id}
        for step in reversed(self.steps):
            if node := step.after.nodes.get(id):
                related |= set(node.origin)
                break
        found = []
        for number, step in enumerate(self.steps):
            for reason in step.edits:
                if related & set(reason.nodes):
                    found.append((number, step.name, reason.why))
            for reason in step.skipped:
                if related & set(reason.nodes):
                    found.append((number, step.name, f"left alone: {reason.why}"))
            if id in step.nodes:
                found.append((number, step.name, f"its value has {step.nodes[id]:.1f} dB SQNR"))
        return found

    def worst(self) -> dict[str, tuple[float, str]]:
        """Node → (SQNR of its value in dB, the pass that left it so), what lost the most first."""
        found: dict[str, tuple[float, str]] = {}
        for step in self.steps:
            for id, sqnr in step.nodes.items():
                if id not in found or sqnr < found[id][0]:
                    found[id] = sqnr, step.name
        return dict(sorted(found.items(), key=lambda item: item[1][0]))


def describe(snapshot: Snapshot, id: str) -> str | None:
    """One node (or parameter) of a program as text, None if it is not there."""
    lines = []
    if id in snapshot.params:
        lines.append(f"parameter {snapshot.params[id]}")
    elif id in snapshot.nodes:
        node = snapshot.nodes[id]
        lines.append(f"{node.shape} = {node.call}")
    else:
        return None
    if id in snapshot.plan:
        lines.append(f"scheme {snapshot.plan[id]}")
    return "\n".join(lines)


def error_text(step: Step) -> str:
    """The relative error of a step in words: how it was measured depends on its effect."""
    if step.effect is None or "error" not in step.metrics:
        return ""
    error = step.metrics["error"]
    sqnr, turned = step.metrics.get("sqnr_db"), step.metrics.get("turned", 0.0)
    words = f"{error:.1e}"
    if sqnr is not None and math.isfinite(sqnr):
        words += f" ({sqnr:.1f} dB)"
    return words + (f", {turned:.1%} of integers" if turned else "")


def step_row(step: Step) -> dict[str, object]:
    """A step as `--json` prints it."""
    return {
        "name": step.name,
        "spec": step.spec,
        "effect": step.effect.value if step.effect else None,
        "seconds": round(step.seconds, 4),
        "edits": len(step.edits),
        "skipped": len(step.skipped),
        "error": step.metrics.get("error"),
        "metrics": {k: v if math.isfinite(v) else None for k, v in step.metrics.items()},
        "changes": str(step.diff),
        "notes": list(step.notes),
    }


def reasons(step: Step) -> list[tuple[int, str]]:
    """(how often, reason) of a step's edits, most frequent first; ids are left out."""
    return _count([e.why for e in step.edits])


def refusals(step: Step) -> list[tuple[int, str]]:
    """(how often, reason) of what a step left alone."""
    return _count([e.why for e in step.skipped])


def _count(texts: Sequence[str]) -> list[tuple[int, str]]:
    """Equal reasons counted; those that differ by numbers alone (layers) are one, with `*`."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(re.sub(r"(?<=[.#])\d+", "*", text), []).append(text)
    found = [
        (len(group), group[0] if len(set(group)) == 1 else template)
        for template, group in groups.items()
    ]
    return sorted(found, key=lambda x: -x[0])
