"""Activations, rounded where they are read: the nodes that do it.

=================  ==============================================================================
dynamic            s from each tensor as it comes: per token, per tensor; a share of its range
cross              s_ij = max|x_i|^α max|X_j|^(1-α) / qmax, per token × channel (CrossQuant,
                   Liu et al. 2024, eq. 5), the channels' maxima from calibration
static             s from calibration, one for the tensor or one for each channel
=================  ==============================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from qcompiler.attention import attentions, spell_out
from qcompiler.edit import Edit
from qcompiler.errors import BadInput, unknown
from qcompiler.facts import Facts
from qcompiler.formats import NAMED_BLOCKS, Grid, QFormat, Scheme
from qcompiler.program import shape_of
from qcompiler.ranges import RANGES
from qcompiler.sites import Edge, Site
from qcompiler.sums import sums

aten = torch.ops.aten
qc = torch.ops.qc
MINMAX = "minmax"


@dataclass(frozen=True)
class InputRounding:
    """How scales of activations are found."""

    ranges: str = MINMAX
    """Range of a static format with one scale."""
    cross: float = 0.0
    """α of CrossQuant for dynamic formats per token; 0 is without."""

    def __post_init__(self) -> None:
        if self.ranges not in (MINMAX, *RANGES):
            raise unknown("range", self.ranges, [MINMAX, *RANGES])
        if not 0 <= self.cross < 1:
            raise BadInput(f"cross is an exponent from 0 to 1; found {self.cross}")

    def needs(self, formats: list[QFormat]) -> set[str]:
        """Facts needed to round to `formats`."""
        static = any(not f.dynamic for f in formats)
        found = {"activations"} if static or (self.cross and formats) else set()
        return found | ({"histograms"} if static and self.ranges != MINMAX else set())

    def write(self, edit: Edit, facts: Facts, edge: Edge, fmt: QFormat) -> fx.Node:
        """What stands for the rounded activation of `edge`."""
        x, like = edge.x, edge.reader
        if fmt.dynamic and not (self.cross and fmt.block == (-1,)):
            return edit.call(qc.fake_quantize.default, x, str(fmt), like=like)
        stem = f"{edge.name.rpartition('/')[0] or edge.name}.{_part(edge)}"
        if fmt.dynamic:
            return self._crossed(edit, facts, edge, fmt, stem)
        seen = facts.activation(edge.name)
        if seen.low == seen.high == 0:
            edit.note(f"{edge.name} read nothing but zeros in all data: what is its range?")
        grid = self.grid(facts, edge, fmt)
        scale = edit.new_param(f"{stem}_scale", grid.scale, like=like)
        zero = grid.zero
        offset = None if zero is None else edit.new_param(f"{stem}_zero", zero, like=like)
        return edit.call(qc.fake_quantize.default, x, str(fmt), scale, offset, like=like)

    def grid(self, facts: Facts, edge: Edge, fmt: QFormat) -> Grid:
        """The grid of a static format: one for the tensor, or one for each channel."""
        seen = facts.activation(edge.name)
        if fmt.block is None:
            low, high = seen.low, seen.high
            if self.ranges != MINMAX:
                low, high = RANGES[self.ranges](facts.histogram(edge.name), fmt)
            return Grid.cover(torch.tensor(low), torch.tensor(high), fmt)
        shape = [1] * len(shape_of(edge.x))
        shape[edge.channel] = -1
        if fmt.blocks((2,) * len(shape)) != tuple(1 if n == -1 else -1 for n in shape):
            raise BadInput(
                f"a static activation has one scale per tensor or per channel; found {fmt} at "
                f"{edge.name}; write `tensor`, `channel`, or add `dynamic`"
            )
        return Grid.cover(seen.minimum.reshape(shape), seen.maximum.reshape(shape), fmt)

    def _crossed(self, edit: Edit, facts: Facts, edge: Edge, fmt: QFormat, stem: str) -> fx.Node:
        x, like = edge.x, edge.reader
        largest = facts.activation(edge.name).absmax
        channels = _positive(largest) ** (1 - self.cross) / fmt.top
        param = edit.new_param(f"{stem}_channels", channels.to(x.meta["val"].dtype), like=like)
        size = edit.call(aten.abs.default, x, like=like)
        token = edit.call(aten.amax.default, size, [-1], True, like=like)
        token = edit.call(aten.clamp_min.default, token, TINY, like=like)
        token = edit.call(aten.pow.Tensor_Scalar, token, self.cross, like=like)
        scale = edit.call(aten.mul.Tensor, token, param, like=like)
        each = replace(fmt, block=(1,), dynamic=False)
        return edit.call(qc.fake_quantize.default, x, str(each), scale, None, like=like)


class Rounder:
    """Has nodes of `edit` read rounded activations; what is read alike is rounded once."""

    def __init__(self, how: InputRounding, edit: Edit, facts: Facts) -> None:
        self._how, self._edit, self._facts = how, edit, facts
        self._known: dict[tuple[fx.Node, QFormat], fx.Node] = {}

    def input(self, site: Site, scheme: Scheme) -> None:
        """Round the input of a site as its scheme says."""
        if scheme.activation and (edge := site.input) is not None:
            self._round(edge, scheme.activation)

    def attention(self) -> None:
        """Round keys, values and probabilities as the plan says."""
        edit = self._edit
        for found in attentions(list(edit.nodes)):
            scheme = edit.plan.get(found.id, Scheme())
            if not scheme.attention:
                continue
            edit.spend(f"computed as the plan says: {scheme}", found.node)
            for part in ("key", "value"):
                if part in scheme.attention:
                    self._round(found.edge(part), scheme.attention[part])
            if scheme.probabilities is not None:
                plain = spell_out(edit, found)
                text = str(scheme.probabilities)
                edit.replace(plain, edit.call(qc.fake_quantize.default, plain, text, like=plain))

    def sums(self) -> None:
        """Round addends as the plan says."""
        for found in sums(list(self._edit.nodes)):
            scheme = self._edit.plan.get(found.id, Scheme())
            if scheme.activation is None:
                continue
            self._edit.spend(f"both addends rounded as the plan says: {scheme}", found.node)
            for edge in found.edges:
                self._round(edge, scheme.activation)

    def _round(self, edge: Edge, fmt: QFormat) -> None:
        key = (edge.x, fmt)
        if key not in self._known:
            self._known[key] = self._how.write(self._edit, self._facts, edge, fmt)
        self._edit.rewire(edge.reader, edge.index, self._known[key])


def channelwise(edge: Edge, fmt: QFormat) -> QFormat:
    """`fmt`, or for a static `channel` format the block that means one scale for each channel."""
    if fmt.dynamic or fmt.block != NAMED_BLOCKS["channel"]:
        return fmt
    block = [-1] * len(shape_of(edge.x))
    block[edge.channel] = 1
    return replace(fmt, block=tuple(block))


def _part(edge: Edge) -> str:
    return edge.name.rpartition(":")[2] if ":" in edge.name else "input"


TINY = 1e-12


def _positive(size: Tensor) -> Tensor:
    """A channel that was never met gets the largest scale: whatever comes there is near zero."""
    return torch.where(size > 0, size, size.max().clamp_min(TINY))
