"""Rounding of what a program carries from call to call: a cache of keys and values in few bits.

    cat([past, new], axis)   →   cat([past, fakequant(new)], axis)

Each row is rounded once, as it is appended, with a scale of its own: for keys and values one for
each token and head (as KVQuant rounds values, Hooper et al. 2024, section 3.2; keys behind their
rotary embedding, since that is what is kept). A backend that stores codes keeps them as such.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.facts import Facts
from qcompiler.formats import QFormat
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.states import states

aten = torch.ops.aten
qc = torch.ops.qc


@dataclass(frozen=True, kw_only=True)
class RoundCache(Pass):
    """Round what grows from call to call to `format`, a dynamic one."""

    name: ClassVar[str] = "round_cache"
    effect: ClassVar[Effect] = Effect.LOSSY

    format: str = "int8:token:dynamic"
    budget: float = 0.5
    """Largest relative error of the outputs."""
    optional: bool = False

    def tolerance(self, facts: Facts) -> float:
        return self.budget

    def run(self, edit: Edit, facts: Facts) -> None:
        found = list(states(facts.program))
        if not found:
            raise BadInput(
                "round_cache: no input of the program grows into an output; capture a language "
                "model with cache=True (--cache)"
            )
        format = QFormat.parse(self.format)
        if not format.dynamic or format.block is None or len(format.block) != 1:
            raise BadInput(
                f"round_cache: {format} has no scales that come of each row alone; expected a "
                "dynamic format by tokens or groups, as int8:token:dynamic"
            )
        for state in found:
            cat, before = edit.own(state.path[-1]), edit.own(state.path[-2])
            if not cat.meta["val"].is_floating_point() or state.axis == cat.meta["val"].ndim - 1:
                edit.skip(cat, "what is appended to it is no rows of numbers")
                continue
            parts: Any = cat.args[0]
            edit.spend(f"each row of what is kept is rounded to {format}", cat)
            rounded = [
                p if p is before
                else edit.call(qc.fake_quantize.default, p, str(format), like=p)
                for p in parts
            ]  # fmt: skip
            made = edit.call(aten.cat.default, rounded, *cat.args[1:], like=cat, replaces=[cat])
            edit.replace(cat, made)
