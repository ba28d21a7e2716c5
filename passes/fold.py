"""Evaluate each weight's expression once, in float64, and round once.

    W' = round( expression(W, …) )      q_proj.weight = q_proj.weight ∘ s

Exact passes write transforms on the weight's edge; this pass turns them into stored numbers, one
weight at a time, so the extra memory is one weight in float64.
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
from qcompiler.program import node_id, op_name
from qcompiler.sites import sites
from qcompiler.stored import DECODERS

aten = torch.ops.aten

VIEWS = {aten.unsqueeze.default, aten.reshape.default, aten.expand.default, aten.slice.Tensor}
LAYOUT = {aten.index_select.default, aten.constant_pad_nd.default, aten.to.dtype, aten.cat.default}
"""How a scale is laid out along an axis: no news in a formula."""
TURNS = {aten.t.default, aten.transpose.int, aten.permute.default}
INFIX = {
    aten.mul.Tensor: "∘",
    aten.matmul.default: "·",
    aten.mv.default: "·",
    aten.div.Tensor: "/",
    aten.add.Tensor: "+",
    aten.sub.Tensor: "-",
}
SUMS = {aten.add.Tensor, aten.sub.Tensor}
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""Largest relative output error that one rounding of every weight may cost, by storage type."""


@dataclass(frozen=True, kw_only=True)
class Fold(Pass):
    """Turn expressions of weights into stored weights (float64, rounded once)."""

    name: ClassVar[str] = "fold"
    effect: ClassVar[Effect] = Effect.LOSSY
    reads: ClassVar[tuple[str, ...]] = ("weights",)
    ends: ClassVar[tuple[str, ...]] = ("maps",)

    def tolerance(self, facts: Facts) -> float:
        """By the coarsest type that something is stored in: most may be held in another."""
        program = facts.program
        made = (n for n in program.weights if n.op == "call_function")
        read = (n for n in made if not program.weights.issuperset(n.users))
        types = {n.meta["val"].dtype for n in read} or {program.dtype}
        return max((ROUNDING.get(d, 1e-1) for d in types if d.is_floating_point), default=1e-1)

    def run(self, edit: Edit, facts: Facts) -> None:
        read = {site.weight for site in sites(edit.nodes)}
        for node in edit.calls():
            if not edit.is_weight(node) or all(map(edit.is_weight, node.users)):
                continue
            if not node.meta["val"].is_floating_point():
                continue
            tree = _expression(node)
            if any(n.target in DECODERS for n in tree):
                continue  # stored in low precision already
            views = all(n.target in VIEWS for n in tree if n.op == "call_function")
            if views and node not in read:
                continue  # a view costs nothing, and only a layer's weight is to be stored anew
            self._fold(edit, facts, node, tree)

    def _fold(self, edit: Edit, facts: Facts, node: fx.Node, tree: list[fx.Node]) -> None:
        value = facts.value(node)
        assert value is not None
        value = value.to(node.meta["val"].dtype).contiguous()
        leaf = _principal(node)
        edit.spend(f"{node_id(leaf)} = {_formula(node)}", node, leaf)
        for part in tree:
            if part.op == "placeholder":
                edit.settle(part)
        if _only_reader(leaf, node):
            users = list(node.users)
            edit.set_param(leaf, value)
            edit.replace(node, leaf, only=users)
        else:
            edit.replace(node, edit.new_param(node_id(leaf), value, like=leaf))


def _formula(node: fx.Node) -> str:
    """`up_proj.weight / smooth.3 ∘ smooth.4`: an expression in words, views left out."""
    if node.op == "placeholder":
        return node_id(node)
    parts = [_formula(n) for n in node.all_input_nodes]
    if node.target in VIEWS or node.target in LAYOUT:
        return parts[0]
    if node.target in TURNS:
        return f"({parts[0]})ᵀ" if " " in parts[0] else f"{parts[0]}ᵀ"
    if node.target in INFIX and len(parts) == 2:
        if node.target not in SUMS:
            inputs = node.all_input_nodes
            parts = [f"({p})" if _is_sum(n) else p for n, p in zip(inputs, parts, strict=True)]
        return f" {INFIX[node.target]} ".join(parts)
    constants = [str(a) for a in node.args if type(a) in (int, float)]
    return f"{op_name(node.target)}({', '.join(parts + constants)})"


def _is_sum(node: fx.Node) -> bool:
    while node.target in VIEWS or node.target in LAYOUT:
        node = node.all_input_nodes[0]
    return node.target in SUMS


def _principal(node: fx.Node) -> fx.Node:
    """The parameter that an expression is about: `W` of mul(W, reshape(s)), by first operands."""
    while node.op != "placeholder":
        node = node.all_input_nodes[0]
    return node


def _expression(node: fx.Node) -> list[fx.Node]:
    """All nodes that `node` is made of, itself first."""
    found: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found[current] = None
            waiting.extend(current.all_input_nodes)
    return list(found)


def _only_reader(leaf: fx.Node, node: fx.Node) -> bool:
    """Whether everything that reads `leaf` ends in `node` alone."""
    waiting = [leaf]
    while waiting:
        for user in waiting.pop().users:
            if user is node:
                continue
            if not user.users or user.op == "output" or user not in _expression(node):
                return False
            waiting.append(user)
    return True
