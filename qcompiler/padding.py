"""Padding: tokens that a mask hides are no data.

    statistics and losses of (batch, tokens, …)   →   of the tokens that count alone

Sentences of a batch are filled up to one length, and an input (batch, tokens) of ones and zeros
says which tokens count. What a network makes of the others reaches no result, and is often all
alike: a Gram matrix, a range or a loss would be of the filling. The input is found by what becomes
of it, not by its name: masks of attention are made of it, and it chooses no row of a table.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, fx

from qcompiler.attention import LAYS_OUT, attentions
from qcompiler.io import Signature
from qcompiler.program import Program
from qcompiler.samples import Flat
from qcompiler.sites import site_of

T = TypeVar("T")
MASK = 3
"""Place of attention's mask among its arguments."""


class Padding:
    """Which tokens of a program's inputs count."""

    def __init__(self, program: Program) -> None:
        self._at = None if (mask := mask_of(program)) is None else program.inputs.index(mask)
        self._io = program.io

    def counts(self, inputs: Flat) -> Tensor | None:
        """Which tokens of a batch count, bool (batch, tokens); None if all do, or none."""
        if self._io.counts:
            value: object = _not_padding(self._io, inputs)
        elif self._at is None:
            return None
        else:
            value = inputs[self._at]
        assert isinstance(value, Tensor)
        zeros = value == 0
        if not bool(((value == 1) | zeros).all()) or bool(zeros.all()) or not bool(zeros.any()):
            return None
        return ~zeros

    def data(self, inputs: Flat, outputs: tuple[T, ...]) -> tuple[T, ...]:
        """Outputs for `inputs` without what is padding."""
        counts = self.counts(inputs)
        found = (rows(y, counts) if isinstance(y, Tensor) else y for y in outputs)
        return tuple(found)  # type: ignore[arg-type]  # a tensor stays one


def _not_padding(io: Signature, inputs: Flat) -> Tensor:
    """Ones for the tokens that are none of the padding, which is counted from the first of all."""
    ((argument, *before, last),) = io.counts.values()
    named = zip((p.name for p in io.ports), inputs, strict=True)
    values = {name: x for name, x in named if isinstance(x, Tensor)}
    sizes = {d: n for p in io.tensors for d, n in zip(p.shape, values[p.name].shape, strict=True)}
    padding, past = values[argument], sum(sizes[d] for d in before)
    place = torch.arange(past, past + sizes[last], device=padding.device)
    return (place >= padding[:, None]).long()


def rows(value: Tensor, counts: Tensor | None) -> Tensor:
    """`value` (batch, tokens, …) or (batch · tokens, …) → (tokens that count, …); as it is where it
    is neither."""
    if counts is None:
        return value
    if value.ndim == 3 and value.shape[:2] == counts.shape:
        return value[counts]
    if value.ndim == 2 and len(value) == counts.numel():
        return value[counts.flatten()]
    return value


def mask_of(program: Program) -> fx.Node | None:
    """The input (batch, tokens) of integers or bools that masks of attention are made of."""
    ports = [n for n in program.inputs if _is_mask(n)]
    if not ports:
        return None
    sources = _sources(program)
    found = [n for n in ports if n in sources and not _chooses_rows(n)]
    return found[0] if len(found) == 1 else None


def _is_mask(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim != 2:
        return False
    return not value.dtype.is_floating_point and not value.dtype.is_complex


def _sources(program: Program) -> set[fx.Node]:
    """All that masks of attention are made of."""
    found: set[fx.Node] = set()
    waiting: list[object] = []
    for attention in attentions(program.graph.nodes):
        waiting += attention.node.args[MASK : MASK + 1]
        waiting.append(attention.node.kwargs.get("attn_mask"))
    while waiting:
        node = waiting.pop()
        if isinstance(node, fx.Node) and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _chooses_rows(node: fx.Node) -> bool:
    """Whether it is itself an index of a table, as token ids are, of which masks may be made too.
    Positions that are counted from a mask are another thing."""
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            site = site_of(user)
            if site is not None and site.kind.name == "embedding":
                return True
            if user.target in LAYS_OUT:
                waiting.append(user)
    return False
