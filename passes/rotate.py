"""Rotate: spread outliers over all channels by orthogonal maps that cancel out.

    x' = x Rᵀ,  W' = W Rᵀ,   x' W'ᵀ = x W ᵀ        R = H diag(±1) / √n

QuaRot (Ashkboos et al. 2024), SpinQuant (Liu et al. 2024). Every free orthogonal space that a layer
reads takes one: the residual stream (R1) once the norms' gains are absorbed, the values of heads
(R2). With `online`, so does a space that one operator would free, the input of the down projection
(R4); that operator is computed at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.hadamard import random_hadamard
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.program import node_id
from qcompiler.sites import sites
from qcompiler.spaces import Space
from qcompiler.spaces import find as find_spaces
from qcompiler.spaces.apply import apply_matrix

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Rotate(Pass):
    """Random Hadamard (or random orthogonal) maps on all orthogonal spaces."""

    name: ClassVar[str] = "rotate"
    effect: ClassVar[Effect] = Effect.EXACT

    kind: Literal["hadamard", "random"] = "hadamard"
    seed: int = 0
    online: bool = False
    """Also rotate where one operator at run time is needed."""

    def run(self, edit: Edit, facts: Facts) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        inputs = _inputs(facts)
        for number, space in enumerate(find_spaces(facts.program, "orthogonal")):
            if inputs.isdisjoint((m.node, m.axis) for m in space.activations):
                continue  # nothing that a quantized layer reads
            behind = _online(space) if self.online else None
            if space.blocked_by and behind is None:
                first = space.blocked_by[0]
                more = len(space.blocked_by) - 1
                edit.skip(
                    first.node,
                    f"{space.size} channels cannot be rotated: {first.reason}"
                    + (f" (and at {more} other nodes)" if more else ""),
                )
                continue
            matrix, word = self._matrix(space.size, generator)
            place = f", computed behind {node_id(behind)}" if behind else ""
            edit.spend(f"{word} of {space.size} channels{place}", *(m.node for m in space.params))
            source = apply_matrix(edit, space, matrix, f"rotate.{number}").source
            if behind is not None:
                _insert(edit, behind, source)

    def _matrix(self, size: int, generator: torch.Generator) -> tuple[Tensor, str]:
        matrix = random_hadamard(size, generator) if self.kind == "hadamard" else None
        if matrix is not None:
            return matrix, "random Hadamard"
        noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(noise)
        # With the signs of R's diagonal the result is uniform over rotations (Mezzadri 2007).
        return q * torch.sign(torch.diagonal(r)), "random rotation"


def _inputs(facts: Facts) -> set[tuple[fx.Node, int]]:
    """(activation, axis) of what each layer contracts."""
    found = set()
    for site in sites(facts.program.graph.nodes):
        if site.x is not None:
            found.add((site.x, site.kind.channel % site.x.meta["val"].ndim))
    return found


def _online(space: Space) -> fx.Node | None:
    """The activation behind which one operator frees the space; it is the whole last axis."""
    if len(space.blocked_by) != 1 or not space.blocked_by[0].produces or space.producers:
        return None  # a producer (a bias, say) would be changed before the operator too
    for member in space.activations:
        if node_id(member.node) == space.blocked_by[0].node:
            whole = torch.equal(member.index, torch.arange(space.size))
            last = member.axis == member.node.meta["val"].ndim - 1
            return member.node if whole and last else None
    return None


def _insert(edit: Edit, behind: fx.Node, source: fx.Node) -> None:
    """x → x Tᵀ for all readers of x."""
    node = next(n for n in edit.nodes if n.name == behind.name)
    users = list(node.users)
    factor = edit.call(aten.t.default, source, like=node)
    factor = edit.call(aten.to.dtype, factor, node.meta["val"].dtype, like=node)
    edit.replace(node, edit.call(aten.matmul.default, node, factor, like=node), only=users)
