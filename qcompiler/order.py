"""Which pass must come before which, from what passes say that they make, read, destroy and end.

    rotate destroys scales, smooth makes them                      →  rotate before smooth
    quantize reads the plan, assign makes it                       →  assign before quantize
    fold ends the maps that can be trained, learn_rotation reads them  →  learn_rotation before fold

A plug-in takes part by using the same words. A pipeline in a wrong order is refused before any work
is done, with the right one in the message.
"""

from __future__ import annotations

from collections.abc import Sequence

from qcompiler.errors import BadInput
from qcompiler.passbase import Pass

WORDS = {
    "rotation": "rotations",
    "scales": "scales",
    "shifts": "shifts",
    "order": "an order of channels",
    "maps": "maps to train",
    "plan": "the plan",
    "splits": "split layers",
    "weights": "weights in floating point",
}
"""What passes make, in words; other words stand for themselves."""


def check_order(passes: Sequence[Pass]) -> None:
    """Raise `BadInput` for the first pass that comes too late."""
    for at, later in enumerate(passes):
        for number, earlier in enumerate(passes[:at]):
            between = passes[number + 1 : at]
            if why := _too_late(later, earlier, passes[:number], between):
                order = ",".join(map(str, right_order(passes)))
                raise BadInput(
                    f"{later.name!r} must come before {earlier.name!r}: {why}. "
                    f"The right order is {order}"
                )


def right_order(passes: Sequence[Pass]) -> list[Pass]:
    """The same passes in an order that keeps every promise, as near to the given one as can be."""
    left, placed = list(passes), list[Pass]()
    while left:
        # A pass may go next if no other that is left would then be too late.
        free = (p for p in left if not any(_too_late(q, p, placed, ()) for q in left if q is not p))
        chosen = next(free, left[0])  # passes that demand a circle stay where they are
        left.remove(chosen)
        placed.append(chosen)
    return placed


def _too_late(later: Pass, earlier: Pass, before: Sequence[Pass], between: Sequence[Pass]) -> str:
    """Why `later` must come before `earlier`; empty if it need not.

    `before` stand in front of both: what `earlier` reads may have been made by one of them. What it
    ends may be made anew `between` the two.
    """
    if type(later) is type(earlier):
        return ""
    for word in later.destroys:
        if word in earlier.gives():
            return f"it destroys {WORDS.get(word, word)}, which {earlier.name!r} makes"
    for word in later.gives():
        if word in earlier.reads and not any(word in p.gives() for p in before):
            return f"it makes {WORDS.get(word, word)}, which {earlier.name!r} reads"
    for word in later.reads:
        if word in earlier.ends and not any(word in p.gives() for p in between):
            return f"it reads {WORDS.get(word, word)}, which {earlier.name!r} ends"
    return ""
