"""All spaces of one kind in a program."""

from __future__ import annotations

from qcompiler.errors import unknown
from qcompiler.program import Program
from qcompiler.spaces.diagonal import diagonal_spaces
from qcompiler.spaces.matrix import SYSTEMS, matrix_spaces
from qcompiler.spaces.rules import walk
from qcompiler.spaces.shift import shift_spaces
from qcompiler.spaces.system import Space

KINDS = ("diagonal", "shift", *SYSTEMS)


def find(program: Program, kind: str = "diagonal") -> list[Space]:
    """All spaces of `kind`, those that are blocked included (see `Space.blocked_by`)."""
    if kind not in KINDS:
        raise unknown("kind of map", kind, KINDS)
    axes = walk(program)
    if kind == "diagonal":
        return diagonal_spaces(axes)
    return shift_spaces(axes) if kind == "shift" else matrix_spaces(axes, kind)
