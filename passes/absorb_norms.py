"""Move the gains and biases of norms into the linears that read them.

    (core(x) ∘ g + b) Wᵀ + d  =  core(x) (W diag(g))ᵀ + (b Wᵀ + d)

Without them, RMSNorm commutes with rotations (QuaRot, Ashkboos et al. 2024, section 3.1). Which
weights take the gain, the diagonal space behind the norm says; no division, so it may be zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.program import node_id
from qcompiler.spaces import Space
from qcompiler.spaces import find as find_spaces
from qcompiler.spaces.apply import spread

aten = torch.ops.aten
GAIN, BIAS = 2, 3
"""Numbers of the arguments of rms_norm and layer_norm."""
ROWS = {aten.select.int, aten.slice.Tensor}
"""They choose some rows, if their axis is not the last."""


@dataclass(frozen=True, kw_only=True)
class AbsorbNorms(Pass):
    """Fold gains and biases of RMSNorm and LayerNorm into their readers."""

    name: ClassVar[str] = "absorb_norms"
    effect: ClassVar[Effect] = Effect.EXACT
    reads: ClassVar[tuple[str, ...]] = ("weights",)
    destroys: ClassVar[tuple[str, ...]] = ("rotation", "scales")

    def run(self, edit: Edit, facts: Facts) -> None:
        found = find_spaces(facts.program)
        for node in edit.calls(aten.rms_norm.default, aten.layer_norm.default):
            gain = _weight(edit, node, GAIN)
            bias = _weight(edit, node, BIAS) if node.target is aten.layer_norm.default else None
            if gain is None and bias is None:
                continue
            linears, others = _readers(edit, node)
            if bias is not None and others:
                why = f"its bias stays: {node_id(others[0])} reads it, which is no linear"
                edit.skip(node, why)
                continue
            space, why = (None, "") if gain is None else _space_of(found, gain, bias)
            if gain is not None and space is None:
                edit.skip(node, f"its gain stays: {why}")
                continue
            what = " and ".join(
                word for word, value in (("gain", gain), ("bias", bias)) if value is not None
            )
            into = ", ".join(node_id(r) for r in linears)
            edit.spend(f"{what}: into {into or 'its readers'}", node)
            before: dict[fx.Node, fx.Node] = {}
            if gain is not None and space is not None:
                before = spread(edit, gain, space, space.consumers, -1)
                edit.rewire(node, GAIN, None)
            if bias is not None:
                for reader in linears:
                    _take_bias(edit, reader, bias, before)
                edit.rewire(node, BIAS, None)


def _weight(edit: Edit, node: fx.Node, index: int) -> fx.Node | None:
    value = node.args[index] if len(node.args) > index else None
    return value if isinstance(value, fx.Node) and edit.is_weight(value) else None


def _readers(edit: Edit, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """(linears by a weight, other operators) that read the channels of `node`, some rows or all."""
    linears: list[fx.Node] = []
    others: list[fx.Node] = []
    waiting = [(node, user) for user in node.users]
    while waiting:
        source, user = waiting.pop(0)
        if user.target is aten.linear.default and user.args[0] is source:
            (linears if edit.is_weight(user.args[1]) else others).append(user)
        elif user.target in ROWS and _other_axis(source, user.args[1]):
            waiting += [(user, next_user) for next_user in user.users]
        else:
            others.append(user)
    return linears, others


def _other_axis(node: fx.Node, axis: object) -> bool:
    rank = node.meta["val"].ndim
    return isinstance(axis, int) and axis % rank != rank - 1


def _take_bias(edit: Edit, reader: fx.Node, bias: fx.Node, before: dict[fx.Node, fx.Node]) -> None:
    """d → b Wᵀ + d, with W `before` it took the gain."""
    weight, old = reader.args[1], reader.args[2] if len(reader.args) > 2 else None
    assert isinstance(weight, fx.Node)
    plain = _plain(edit, weight, before)
    new = edit.call(aten.mv.default, plain, bias, like=reader)
    if old is not None:
        new = edit.call(aten.add.Tensor, new, old, like=reader)
    edit.rewire(reader, 2, new)


def _plain(edit: Edit, node: fx.Node, before: dict[fx.Node, fx.Node]) -> fx.Node:
    """A weight's expression without what was put into it since."""
    if node in before:
        return before[node]
    inputs = {n: _plain(edit, n, before) for n in node.all_input_nodes}
    if all(old is new for old, new in inputs.items()):
        return node
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: inputs[n])
    return edit.call(node.target, *args, like=node, **kwargs)  # type: ignore[arg-type]


def _space_of(found: list[Space], gain: fx.Node, bias: fx.Node | None) -> tuple[Space | None, str]:
    """The space that only `gain` (and `bias`) writes to, or why there is none."""
    why = "it is read through an expression"
    own = {gain.name} | ({bias.name} if bias is not None else set())
    for space in found:
        if gain.name not in {m.node.name for m in space.producers}:
            continue
        if space.blocked_by:
            first = space.blocked_by[0]
            why = f"{first.reason} at {first.node}"
        elif {m.node.name for m in space.producers} - own or len(gain.users) > 1:
            why = "other parameters would have to take its inverse"
        elif not torch.equal(space.producers[0].index.flatten(), torch.arange(space.size)):
            why = "its channels are shared or only some of them are free"
        elif space.consumers:
            return space, ""
    return None, why
