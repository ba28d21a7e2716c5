"""Channel spaces: where a map and its inverse can be put, found from the graph alone.

`find(program)` walks the operators once (`rules.py`), gives every axis of every value a term
(`terms.py`) and asks which maps of a kind cancel out: factors per channel (`diagonal.py`), vectors
that are added (`shift.py`), matrices that mix channels or put them in another order (`matrix.py`).
All kinds read the same statements.
"""

from __future__ import annotations

from qcompiler.errors import unknown
from qcompiler.program import Program
from qcompiler.spaces.diagonal import diagonal_spaces
from qcompiler.spaces.matrix import SYSTEMS, matrix_spaces
from qcompiler.spaces.rules import walk
from qcompiler.spaces.shift import shift_spaces
from qcompiler.spaces.system import Blocker, Member, Space

__all__ = ["KINDS", "Blocker", "Member", "Space", "find"]


KINDS = ("diagonal", "shift", *SYSTEMS)


def find(program: Program, kind: str = "diagonal") -> list[Space]:
    """All spaces of `kind`, those that are blocked included (see `Space.blocked_by`)."""
    if kind not in KINDS:
        raise unknown("kind of map", kind, KINDS)
    axes = walk(program)
    if kind == "diagonal":
        return diagonal_spaces(axes)
    return shift_spaces(axes) if kind == "shift" else matrix_spaces(axes, kind)
