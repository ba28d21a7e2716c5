"""Channel spaces: where a map and its inverse can be put, found from the graph alone.

`find(program)` walks the operators once (`rules.py`), gives every axis of every value a term
(`terms.py`) and asks which maps of a kind cancel out. Diagonal maps come first (`diagonal.py`);
other kinds read the same statements.
"""

from __future__ import annotations

from qcompiler.errors import BadInput
from qcompiler.program import Program
from qcompiler.spaces.diagonal import diagonal_spaces
from qcompiler.spaces.rules import walk
from qcompiler.spaces.system import Blocker, Member, Space

__all__ = ["Blocker", "Member", "Space", "find"]


def find(program: Program, kind: str = "diagonal") -> list[Space]:
    """All spaces of `kind`, those that are blocked included (see `Space.blocked_by`)."""
    if kind != "diagonal":
        raise BadInput(f"no analysis for {kind!r} maps yet; known: diagonal")
    return diagonal_spaces(walk(program))
