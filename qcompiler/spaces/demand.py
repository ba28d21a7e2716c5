"""What a recipe insists on: named weights whose space must take the map, or nothing is done."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from qcompiler.errors import BadInput
from qcompiler.spaces.system import Space


def demand(
    what: str, patterns: Sequence[str], taken: Sequence[Space], refused: Sequence[Space]
) -> None:
    """Refuse if a weight that matches a pattern is in no space that was taken.

    `what` begins the message (`rotate`). The error names the node in the way and its reason.
    """
    for pattern in patterns:
        if _with(pattern, taken):
            continue
        blocked = [s for s in _with(pattern, refused) if s.blocked_by]
        if blocked:
            widest = max(blocked, key=lambda s: s.size)
            first = widest.blocked_by[0]
            raise BadInput(
                f"{what}: {pattern!r} is demanded, but its {widest.size} channels are blocked at "
                f"{first.node}: {first.reason}"
            )
        raise BadInput(
            f"{what}: {pattern!r} is demanded, but no weight of that name is in any space of this "
            "kind; `qcompiler inspect MODEL --spaces` lists them"
        )


def _with(pattern: str, spaces: Sequence[Space]) -> list[Space]:
    return [s for s in spaces if any(fnmatch.fnmatch(m.name, pattern) for m in s.params)]
