"""What attention scores are made of: a scaled product of q and kᵀ, and masks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from qcompiler.edit import Edit
from qcompiler.passes.canonicalize.masks import HUGE, choice, filled, kept_by
from qcompiler.passes.canonicalize.match import ADD, is_call, is_number, operands, uncast, unscaled
from qcompiler.passes.canonicalize.tidy import same_size
from qcompiler.program import shape_of

aten = torch.ops.aten

INFINITE = float("-inf")


@dataclass(frozen=True)
class Scores:
    """scale · q kᵀ, with masks."""

    product: fx.Node
    """q kᵀ"""
    scale: float = 1.0
    added: fx.Node | None = None
    """Summand of the scores."""
    kept: tuple[fx.Node, bool, float] | None = None
    """(condition, c, f): the scores are f where the condition is not c."""


def unguarded(edit: Edit, node: fx.Node) -> tuple[fx.Node, bool]:
    """The probabilities behind a replacement of NaN by 0, and whether there is one."""
    node = uncast(node)
    found = choice(node)
    if found is not None and is_number(edit, found[1], 0) and isinstance(found[2], fx.Node):
        condition, _, p = found
        if is_call(condition, aten.isnan.default) and condition.args[0] is p:
            return uncast(p), True
    return node, False


def scores_of(edit: Edit, node: object) -> Scores | None:
    """`node` as scores, with at most one mask of each kind; None if it is something else."""
    if not isinstance(node, fx.Node):
        return None
    scale, node = unscaled(edit, uncast(node))
    if scale != 1:
        inner = scores_of(edit, node)
        plain = inner is not None and inner.added is None and inner.kept is None
        return replace(inner, scale=inner.scale * scale) if plain else None  # type: ignore
    if is_call(node, aten.matmul.default):
        return Scores(node)
    if is_call(node, *ADD) and not node.kwargs:
        for part, mask in operands(node):
            inner = scores_of(edit, part)
            if inner is not None and inner.added is None and inner.kept is None:
                return _masked(edit, inner, mask)
        return None
    found = filled(edit, node)
    if found is None:
        return None
    x, condition, kept, fill = found
    inner = scores_of(edit, x)
    if inner is None or inner.kept is not None or not fill <= -HUGE:
        return None
    return replace(inner, kept=(condition, kept, fill))


def _masked(edit: Edit, scores: Scores, mask: fx.Node) -> Scores:
    condition = kept_by(edit, mask)
    if condition is None:
        return replace(scores, added=mask)
    return replace(scores, kept=(*condition, INFINITE))


def same_heads(product: fx.Node, value: fx.Node) -> bool:
    """Whether q, kᵀ and v have the same batch and heads, nothing broadcast."""
    q, kt = product.args
    shapes = [shape_of(x) for x in (q, kt, value)]  # type: ignore[arg-type]
    same = (same_size(s[i], shapes[0][i]) for s in shapes for i in (0, 1))
    return all(len(s) == 4 for s in shapes) and all(same)
