"""Caches of keys and values that are rounded by rows are kept as codes, and read as such.

cat([past, fakequant(new)], axis)            →   qc_triton::append_rows(past, new, axis, fp8)
scaled_dot_product_attention(q, k, v, mask)  →   qc_triton::attend(q, k, v, mask, scale, causal)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qcompiler.attention import arguments, attentions, scale_of
from qcompiler.backends.triton.cache import APPEND_ROWS, ATTEND, FORMATS
from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.states import State, appended, states

qc = torch.ops.qc


@dataclass(frozen=True, kw_only=True)
class LowerCache(Pass):
    """The two rewrites above."""

    name: ClassVar[str] = "triton_cache"
    effect: ClassVar[Effect] = Effect.LOWER

    exclude: tuple[str, ...] = ()
    """Ids of nodes to leave as they are."""
    optional: bool = True

    def tolerance(self, facts: Facts) -> float:
        return 0.0

    def run(self, edit: Edit, facts: Facts) -> None:
        readers = {
            found.node: given
            for found in attentions(edit.nodes)
            if found.id not in self.exclude and _served(given := arguments(found.node))
        }
        read: set[fx.Node] = set()
        for state in states(facts.program):
            cat, found = edit.own(state.path[-1]), appended(state, facts.program)
            if not isinstance(found, tuple):
                continue  # it grows as it did
            past, new = map(edit.own, found)
            if reason := _unfit(state, cat, new, readers):
                edit.skip(cat, reason)
                continue
            edit.spend("append codes in place", cat)
            fp8 = FORMATS[str(new.args[1])]
            made = edit.call(
                APPEND_ROWS, past, new.args[0], state.axis, fp8, like=cat, replaces=[cat]
            )
            read |= {u for u in cat.users if u in readers}
            edit.replace(cat, made)
        for node in sorted(read):
            edit.spend("attend to codes", node)
            q, k, v, mask = (
                arguments(node).get(name) for name in ("query", "key", "value", "attn_mask")
            )
            causal = bool(readers[node].get("is_causal"))
            new = edit.call(
                ATTEND, q, k, v, mask, scale_of(node), causal, like=node, replaces=[node]
            )
            edit.replace(node, new)


def _served(given: Mapping[str, Any]) -> bool:
    """Whether `attend` computes an attention."""
    q, k, v = (given[name].meta["val"].shape for name in ("query", "key", "value"))
    plain = all(len(shape) == 4 and isinstance(shape[1], int) for shape in (q, k, v))
    return plain and str(q[3]) == str(v[3]) and not given.get("dropout_p")


def _unfit(
    state: State, cat: fx.Node, new: fx.Node, readers: Mapping[fx.Node, Mapping[str, Any]]
) -> str | None:
    """Why something that grows is not kept as codes, or None."""
    if new.target is not qc.fake_quantize.default or len(new.args) != 2:
        return "takes what is rounded by rows as it is appended (round_cache)"
    if str(new.args[1]) not in FORMATS:
        return f"keeps {' and '.join(FORMATS)}; found {new.args[1]}"
    if state.axis != 2 or cat.meta["val"].ndim != 4:
        return "takes caches (batch, heads, tokens, channels)"
    if cat.meta["val"].dtype == torch.float64:
        return "has scales of float32, which float64 would be rounded to"
    for user in cat.users:
        names = [name for name, given in readers.get(user, {}).items() if given is cat]
        if user.op != "output" and (not names or not set(names) <= {"key", "value"}):
            return f"is read by {user}, which is no attention of four axes"
    return None
