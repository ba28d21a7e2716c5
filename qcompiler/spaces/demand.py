"""What a recipe insists on: named weights whose space must take the map, or nothing is done."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from qcompiler.errors import BadInput
from qcompiler.spaces.system import Space


def demand(
    what: str,
    patterns: Sequence[str],
    taken: Iterable[Space],
    blocked: Iterable[Space],
    left: Iterable[tuple[Space, str]] = (),
) -> None:
    """Refuse if a weight that matches a pattern is in no space that was taken.

    `what` begins the message (`rotate`). `left` are free spaces that the pass left out, and why.
    The error names the node in the way, or that reason.
    """
    reasons = {name: why for space, why in left for name in _names(space)}
    for space in blocked:
        if space.blocked_by:
            first = space.blocked_by[0]
            why = f"its {space.size} channels are blocked at {first.node}: {first.reason}"
            reasons |= {name: why for name in _names(space)}
    met = {name for space in taken for name in _names(space)}
    for pattern in patterns:
        missed = [n for n in reasons if n not in met and fnmatch.fnmatch(n, pattern)]
        if missed:
            raise BadInput(f"{what}: {missed[0]!r} is demanded, but {reasons[missed[0]]}")
        if not any(fnmatch.fnmatch(name, pattern) for name in met):
            raise BadInput(
                f"{what}: {pattern!r} is demanded, but no weight of that name is in any space of "
                "this kind; `qcompiler inspect MODEL --spaces` lists them"
            )


def _names(space: Space) -> list[str]:
    """Who is changed with the space; of shifts, the layers that read what is shifted."""
    return [m.name for m in space.params if not m.makes]
