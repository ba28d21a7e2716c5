"""Attention as a site: keys, values and probabilities that can be rounded like any activation.

    y = fakequant( softmax(q Rope(fakequant(k))ᵀ / √d + mask) ) fakequant(v)

Keys are rounded before their rotary embedding, where a channel is still one channel (KVQuant,
Hooper et al. 2024, section 3.1), values per token. Formats for them stand in the plan under the id
of the attention node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompiler.edit import Edit
from qcompiler.layout import PASS, PERMUTATIONS, RESHAPES
from qcompiler.program import node_id
from qcompiler.sites import Edge

aten = torch.ops.aten
qc = torch.ops.qc
LAYS_OUT = PASS | PERMUTATIONS | RESHAPES | {aten.expand.default, aten.repeat_interleave.self_int}


@dataclass(frozen=True)
class Attention:
    """One `scaled_dot_product_attention`."""

    node: fx.Node

    @property
    def id(self) -> str:
        return node_id(self.node)

    def edge(self, part: str) -> Edge:
        """Where keys, or values, are rounded; channels are the last axis.

        Keys: as far back as they are only laid out and turned. Values: where attention reads them.
        """
        reader, index = (self.node, 1) if part == "key" else (self.node, 2)
        while part == "key" and isinstance(source := reader.args[index], fx.Node):
            if source.target not in LAYS_OUT and source.target is not qc.rope.default:
                break
            reader, index = source, 0
        return Edge(f"{self.id}:{part}", reader, index, -1)


def attentions(nodes: Iterable[fx.Node]) -> list[Attention]:
    """All attention among `nodes`, in order."""
    target = aten.scaled_dot_product_attention.default
    return [Attention(n) for n in nodes if n.op == "call_function" and n.target is target]


def arguments(node: fx.Node) -> dict[str, Any]:
    """What an attention is given, by name."""
    names = (
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"
    )  # fmt: skip
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def scale_of(node: fx.Node) -> float:
    """What its scores are multiplied by."""
    given = arguments(node)
    scale: float | None = given.get("scale")
    return int(given["query"].meta["val"].shape[-1]) ** -0.5 if scale is None else scale


def spell_out(edit: Edit, found: Attention) -> fx.Node:
    """Replace the operator by its definition; the node of the probabilities."""
    node = found.node
    given = arguments(node)

    def call(target: object, *args: object) -> fx.Node:
        return edit.call(target, *args, like=node)  # type: ignore[arg-type]

    query, key, value = given["query"], given["key"], given["value"]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    if given.get("enable_gqa"):
        repeats = int(query.meta["val"].shape[-3]) // int(key.meta["val"].shape[-3])
        if repeats > 1:
            key, value = (
                call(aten.repeat_interleave.self_int, t, repeats, -3) for t in (key, value)
            )
    scores = call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1))
    scores = call(aten.mul.Tensor, scores, scale_of(node))
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        seen = call(aten.tril.default, call(aten.ones_like.default, scores))
        hidden = call(aten.eq.Scalar, seen, 0)
        scores = call(aten.masked_fill.Scalar, scores, hidden, -torch.inf)
    elif isinstance(mask, fx.Node) and mask.meta["val"].dtype == torch.bool:
        hidden = call(aten.logical_not.default, mask)
        scores = call(aten.masked_fill.Scalar, scores, hidden, -torch.inf)
    elif isinstance(mask, fx.Node):
        scores = call(aten.add.Tensor, scores, mask)
    probabilities = call(aten.softmax.int, scores, -1)
    if mask is not None:  # a query that sees no key gets zero, as the operator has it
        blind = call(aten.all.dim, call(aten.eq.Scalar, scores, -torch.inf), -1, True)
        probabilities = call(aten.masked_fill.Scalar, probabilities, blind, 0.0)
    new = edit.call(aten.matmul.default, probabilities, value, like=node, replaces=[node])
    edit.replace(node, new)
    return probabilities
