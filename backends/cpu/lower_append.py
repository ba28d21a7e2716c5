"""What inputs grow by, written behind them; rows that are rounded first, as codes.

cat([past, new], axis)                 →   qc_cpu::append(past, new, axis)
cat([past, fakequant(new)], axis)      →   qc_cpu::append_rows(past, new, axis)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcompiler.backends.cpu.append import APPEND
from qcompiler.backends.cpu.coded import APPEND_ROWS, FORMAT
from qcompiler.backends.cpu.codegen.layout import CHUNK
from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.states import State, appended, states

ATTEND = torch.ops.qc_cpu.attend.default
qc = torch.ops.qc


@dataclass(frozen=True, kw_only=True)
class LowerAppend(Pass):
    """The two rewrites above."""

    name: ClassVar[str] = "cpu_append"
    effect: ClassVar[Effect] = Effect.LOWER

    exclude: tuple[str, ...] = ()
    """Ids of nodes to leave as they are."""
    optional: bool = True

    def tolerance(self, facts: Facts) -> float:
        return 0.0

    def run(self, edit: Edit, facts: Facts) -> None:
        for state in states(facts.program):
            cat, found = edit.own(state.path[-1]), appended(state, facts.program)
            if isinstance(found, str):
                edit.skip(cat, found)
            if not isinstance(found, tuple):
                continue
            past, new = map(edit.own, found)
            coded = _coded(state, cat, new)
            edit.spend("append codes in place" if coded else "append in place", cat)
            target, given = (APPEND_ROWS, new.args[0]) if coded else (APPEND, new)
            made = edit.call(target, past, given, state.axis, like=cat, replaces=[cat])
            edit.replace(cat, made)


def _coded(state: State, cat: fx.Node, new: fx.Node) -> bool:
    """Whether what is appended is rounded by rows, and read by what takes codes."""
    if new.target is not qc.fake_quantize.default or tuple(new.args[1:]) != (FORMAT,):
        return False
    value = cat.meta["val"]
    rows = value.dtype == torch.float32 and state.axis < value.ndim - 1
    rows = rows and isinstance(value.shape[-1], int) and value.shape[-1] % CHUNK == 0
    return rows and all(u.op == "output" or u.target is ATTEND for u in cat.users)
