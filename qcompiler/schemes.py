"""Texts as schemes in a site's shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import fx

from qcompiler.activations import channelwise
from qcompiler.errors import BadInput
from qcompiler.formats import NAMED_BLOCKS, QFormat, Scheme
from qcompiler.sites import Site, site_of
from qcompiler.stored import is_stored

FLOAT = "float"
QUANTIZED = (
    "its weight is quantized already; compile with the passes `canonicalize,adopt` to keep it so, "
    "or put `unquantize` before this pass to choose anew"
)


def why_not(site: Site, is_weight: Callable[[fx.Node], bool]) -> str | None:
    """Why a site can have no scheme; None if it can."""
    if not (site.node.meta["val"].is_floating_point() and is_weight(site.weight)):
        return "its weight is computed from the input"
    # What the plan says must be what the graph computes: kernels are chosen by it.
    return QUANTIZED if is_stored(site.weight) else None


def fit(site: Site, weight: str, activation: str = FLOAT) -> Scheme:
    """The scheme in this site's shape: what `channel` and `token` are for a convolution."""
    w = None if weight == FLOAT else QFormat.parse(weight)
    a = None if activation == FLOAT or site.kind.x is None else QFormat.parse(activation)
    if w is not None and w.symmetric and w.kind.one_sided:
        raise BadInput(f"{w.element} has no negative numbers, and a weight has; found {w}")
    if w is not None and w.dynamic:
        raise BadInput(f"a weight has no dynamic scales; found {weight!r}")
    if a is not None and (edge := site.input) is not None:
        a = channelwise(edge, a)
    if site.kind.name == "conv":
        rank = site.weight.meta["val"].ndim
        if w is not None and w.block is not None:
            w = replace(w, block=(-1,) * (rank - 1))  # a convolution has no groups of inputs
        if a is not None and a.block == NAMED_BLOCKS["token"]:
            a = replace(a, block=(-1,) * (rank - 1))
    return Scheme(w, a)


def is_head(node: fx.Node) -> bool:
    """Whether every path from `node` to an output meets no other site."""
    waiting, seen = list(node.users), set()
    reaches = False
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if site_of(current) is not None:
            return False
        reaches = reaches or current.op == "output"
        waiting.extend(current.users)
    return reaches
