"""LayerNorm becomes RMSNorm: the mean is taken off by whoever writes the stream.

    layer_norm(x) = rms_norm(x - mean(x)),    W' = W - mean over its output channels of W

SliceGPT (Ashkboos et al. 2024), section 3.2. It holds where nobody else sees the mean: the centring
spaces say where. It is no change to do to a model with RMSNorm, which sees the mean.
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
from qcompiler.spaces import Space
from qcompiler.spaces import find as find_spaces

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Center(Pass):
    """Centre the writers of streams that only LayerNorms read."""

    name: ClassVar[str] = "center"
    effect: ClassVar[Effect] = Effect.EXACT
    reads: ClassVar[tuple[str, ...]] = ("weights",)
    destroys: ClassVar[tuple[str, ...]] = ("rotation",)

    def run(self, edit: Edit, facts: Facts) -> None:
        for space in find_spaces(facts.program, "centring"):
            norms = _norms(edit, space)
            if not norms:
                continue
            if space.blocked_by:
                first = space.blocked_by[0]
                why = f"the mean of its input is seen: {first.reason} at {first.node}"
                for norm in norms:
                    edit.skip(norm, why)
                continue
            names = ", ".join(dict.fromkeys(m.name for m in space.params))
            edit.spend(f"{names} are centred, so it is an RMSNorm", *norms)
            for member in space.params:
                node = edit.own(member.node)
                mean = edit.call(aten.mean.dim, node, [member.axis], True, like=node)
                centred = edit.call(aten.sub.Tensor, node, mean, like=node)
                edit.extend(node, centred)
            for norm in norms:
                _to_rms(edit, norm)


def _norms(edit: Edit, space: Space) -> list[fx.Node]:
    """LayerNorms over the whole axis of the space."""
    inside = {m.node.name: m for m in space.activations}
    found = []
    for node in edit.calls(aten.layer_norm.default):
        x, shape = node.args[:2]
        member = inside.get(x.name) if isinstance(x, fx.Node) else None
        last = node.meta["val"].ndim - 1
        if member and member.axis == last and shape == [space.size]:
            found.append(node)
    whole = torch.arange(space.size)
    return found if all(torch.equal(m.index, whole) for m in space.params) else []


def _to_rms(edit: Edit, node: fx.Node) -> None:
    x, shape, gain, bias, eps = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
    new = edit.call(aten.rms_norm.default, x, shape, gain, eps, like=node, replaces=[node])
    if bias is not None:
        new = edit.call(aten.add.Tensor, new, bias, like=node, replaces=[node])
    edit.replace(node, new)
