"""Channel spaces: where a map and its inverse can be put, found from the graph alone.

`find(program)` walks the operators once (`rules.py`), gives every axis of every value a term
(`terms.py`) and asks which maps of a kind cancel out: factors per channel (`diagonal.py`), vectors
that are added (`shift.py`), matrices that mix channels or put them in another order (`matrix.py`).
All kinds read the same statements.
"""

from __future__ import annotations

from qcompiler.spaces.inputs import Group, Inputs, inputs_of
from qcompiler.spaces.kinds import KINDS, find
from qcompiler.spaces.system import Blocker, Member, Space

__all__ = ["KINDS", "Blocker", "Group", "Inputs", "Member", "Space", "find", "inputs_of"]
