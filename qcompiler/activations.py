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

from qcompiler.edit import Edit
from qcompiler.errors import BadInput, unknown
from qcompiler.facts import Facts
from qcompiler.formats import Grid, QFormat
from qcompiler.program import shape_of
from qcompiler.ranges import RANGES
from qcompiler.sites import Site

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

    def write(self, edit: Edit, facts: Facts, site: Site, fmt: QFormat) -> fx.Node:
        """The rounded input of `site`."""
        assert site.x is not None
        if fmt.dynamic and not (self.cross and fmt.block == (-1,)):
            return edit.call(qc.fake_quantize.default, site.x, str(fmt), like=site.node)
        if fmt.dynamic:
            return self._crossed(edit, facts, site, fmt)
        grid = self.grid(facts, site, fmt)
        stem = f"{site.id.rpartition('/')[0] or site.id}.input"
        scale = edit.new_param(f"{stem}_scale", grid.scale, like=site.node)
        zero = None
        if grid.zero is not None:
            zero = edit.new_param(f"{stem}_zero", grid.zero, like=site.node)
        return edit.call(qc.fake_quantize.default, site.x, str(fmt), scale, zero, like=site.node)

    def grid(self, facts: Facts, site: Site, fmt: QFormat) -> Grid:
        """The grid of a static format: one for the tensor, or one for each channel."""
        assert site.x is not None
        seen = facts.activation(site.id)
        if fmt.block is None:
            low, high = seen.low, seen.high
            if self.ranges != MINMAX:
                low, high = RANGES[self.ranges](facts.histogram(site.id), fmt)
            return Grid.cover(torch.tensor(low), torch.tensor(high), fmt)
        rank = len(shape_of(site.x))
        shape = [1] * rank
        shape[site.kind.channel] = -1
        wanted = tuple(1 if n == -1 else -1 for n in shape)
        if fmt.blocks((2,) * rank) != wanted:
            raise BadInput(
                f"a static activation has one scale per tensor or per channel; found {fmt} at "
                f"{site.id}; write `tensor`, `channel`, or add `dynamic`"
            )
        return Grid.cover(seen.minimum.reshape(shape), seen.maximum.reshape(shape), fmt)

    def _crossed(self, edit: Edit, facts: Facts, site: Site, fmt: QFormat) -> fx.Node:
        node, x = site.node, site.x
        assert x is not None
        largest = facts.activation(site.id).absmax
        channels = _positive(largest) ** (1 - self.cross) / fmt.top
        stem = f"{site.id.rpartition('/')[0] or site.id}.input_channels"
        param = edit.new_param(stem, channels.to(x.meta["val"].dtype), like=node)
        size = edit.call(aten.abs.default, x, like=node)
        token = edit.call(aten.amax.default, size, [-1], True, like=node)
        token = edit.call(aten.clamp_min.default, token, TINY, like=node)
        token = edit.call(aten.pow.Tensor_Scalar, token, self.cross, like=node)
        scale = edit.call(aten.mul.Tensor, token, param, like=node)
        each = replace(fmt, block=(1,), dynamic=False)
        return edit.call(qc.fake_quantize.default, x, str(each), scale, None, like=node)


TINY = 1e-12


def _positive(size: Tensor) -> Tensor:
    """A channel that was never met gets the largest scale: whatever comes there is near zero."""
    return torch.where(size > 0, size, size.max().clamp_min(TINY))
