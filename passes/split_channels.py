"""OCS: two halves of an outlier, in two copies of its channel, round on a finer grid.

    x_j w_j = x_j (w_j - Δ/2)/2 + x_j (w_j + Δ/2)/2        Q(w) = Q((w - Δ/2)/2) + Q((w + Δ/2)/2)

(Zhao et al. 2019.) Channels that hold the largest weights are read twice, so that the range of
every row falls; the second equation says that on an equal grid of step Δ nothing is lost by it. Or,
with `halve=activation`, x_j w_j = (x_j/2) w_j + (x_j/2) w_j halves the largest inputs.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.formats import Grid, block_range, spread
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.split import Columns, Layer, Split, accept, computed, join, layers, main, require

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class SplitChannels(Pass):
    """Read channels with outliers twice, half of the weight each time (OCS)."""

    name: ClassVar[str] = "split_channels"
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[tuple[str, ...]] = ("activations", "samples")
    makes: ClassVar[tuple[str, ...]] = ("splits",)
    reads: ClassVar[tuple[str, ...]] = ("weights", "plan")

    ratio: float = 0.02
    """Splits for each input channel, rounded up; a half may be split again."""
    multiple: int = 1
    """Splits are rounded up to a multiple of this, so that a kernel finds whole groups."""
    halve: Literal["weight", "activation"] = "weight"
    """Whether the largest weights are halved, or the largest inputs."""
    gain: float = 0.1
    """Share by which a layer's error must fall; a negative one lets it rise."""

    def run(self, edit: Edit, facts: Facts) -> None:
        require(self.name, "ratio", self.ratio, 0 < self.ratio <= 1, "above 0 and at most 1")
        require(self.name, "multiple", self.multiple, self.multiple >= 1, "at least 1")
        require(self.name, "gain", self.gain, self.gain < 1, "below 1")
        columns, inputs = Columns(edit), self.halve == "activation"
        for layer in layers(edit, facts, self.name):
            rows, width = layer.weight.shape
            size = facts.activation(layer.site.id).absmax if inputs else _largest(layer)
            splits = math.ceil(math.ceil(self.ratio * width) / self.multiple) * self.multiple
            copies = _copies(size, splits)
            share = copies.share if inputs else None
            x, weight = layer.x[:, copies.index], layer.weight[:, copies.index]
            if inputs:
                x = x * copies.share
            else:
                step, group = _steps(layer, copies)
                weight = weight * copies.share + step[:, group] * copies.offset
            split = Split(
                f"split of {splits} channel{'s' * (splits > 1)}",
                layer.error(computed(x, weight, layer.scheme)),
                layer.format.bytes((rows, len(copies.index)))
                + columns.bytes(layer, copies.index, share),
                splits / width,
            )
            if accept(edit, layer, split, self.gain):
                at, picked = columns.of(layer, copies.index, "copies", share)
                new = edit.call(
                    aten.index_select.default, layer.site.weight, 1, at, like=layer.site.node
                )
                new = new if inputs else _halved(edit, layer, new, copies)
                join(edit, layer, main(edit, layer, picked, new))


@dataclass(frozen=True)
class _Copies:
    """Copies of channels, each w · share + Δ · offset: binary fractions, exact in every type."""

    index: Tensor
    """The channel that each is a copy of."""
    share: Tensor
    offset: Tensor


def _copies(size: Tensor, splits: int) -> _Copies:
    """The channels, and `splits` more: each time the copy with the largest size is halved."""
    copies = [(j, 1.0, 0.0) for j in range(len(size))]
    heap = [(-s, j) for j, s in enumerate(size.tolist())]
    heapq.heapify(heap)
    for _ in range(splits):
        largest, place = heapq.heappop(heap)
        j, share, offset = copies[place]
        copies[place] = (j, share / 2, offset / 2 - 0.25)
        copies.append((j, share / 2, offset / 2 + 0.25))
        heapq.heappush(heap, (largest / 2, place))
        heapq.heappush(heap, (largest / 2, len(copies) - 1))
    return _Copies(*(torch.tensor(column) for column in zip(*copies, strict=True)))


def _largest(layer: Layer) -> Tensor:
    """Largest |w| of each channel as a share of its block's; rows with scales of their own are
    averaged. With one scale for the whole matrix this is the paper's order."""
    size = layer.weight.abs()
    largest = spread(block_range(size, layer.format)[1], tuple(size.shape), layer.format)
    share = size / largest.clamp(min=torch.finfo(size.dtype).tiny)
    return share.amax(0) if layer.format.block is None else share.mean(0)


def _steps(layer: Layer, copies: _Copies) -> tuple[Tensor, Tensor]:
    """Δ of the grid on which the halves will lie (rows or 1, groups), and each copy's group."""
    halved = layer.weight[:, copies.index] * copies.share
    step = Grid.fit(halved, layer.format).scale
    # Both halves take the step of the place where the first one lies, so that they cancel.
    groups = torch.arange(step.shape[1]).reshape(1, -1)
    group = spread(groups, (1, len(copies.index)), layer.format).expand(1, len(copies.index))
    return step, group[0, copies.index]


def _halved(edit: Edit, layer: Layer, weight: fx.Node, copies: _Copies) -> fx.Node:
    """W · share + Δ · offset; one Δ for a block, so that until `fold` no second W is in memory."""
    node, dtype = layer.site.node, layer.dtype

    def param(name: str, value: Tensor) -> fx.Node:
        return edit.new_param(f"{layer.stem}.copies_{name}", value, like=node)

    step, group = _steps(layer, copies)
    steps = param("step", step.to(dtype))
    if step.shape[1] > 1:
        places = param("group", group.to(torch.int32))
        steps = edit.call(aten.index_select.default, steps, 1, places, like=node)
    shift = edit.call(aten.mul.Tensor, steps, param("offset", copies.offset.to(dtype)), like=node)
    new = edit.call(aten.mul.Tensor, weight, param("share", copies.share.to(dtype)), like=node)
    return edit.call(aten.add.Tensor, new, shift, like=node)
