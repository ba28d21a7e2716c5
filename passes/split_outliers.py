"""LLM.int8(), decided ahead of time: channels with outliers are a linear of their own.

    x Wᵀ = x_R W_Rᵀ + x_O W_Oᵀ        O = { j : max|X_j| > threshold · median over channels }

(Dettmers et al. 2022.) The paper finds O in each input as it comes; here calibration finds it, so
that both parts are plain layers: R in the plan's formats, O in better ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.facts import Facts
from qcompiler.formats import QFormat, Scheme
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.split import Columns, Layer, Split, accept, computed, join, layers, main, require

aten = torch.ops.aten
FLOAT = "float"


@dataclass(frozen=True, kw_only=True)
class SplitOutliers(Pass):
    """Compute input channels with outliers in a second linear (LLM.int8)."""

    name: ClassVar[str] = "split_outliers"
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[tuple[str, ...]] = ("activations", "samples")
    makes: ClassVar[tuple[str, ...]] = ("splits",)
    reads: ClassVar[tuple[str, ...]] = ("weights", "plan")

    threshold: float = 6.0
    """Largest magnitude of an ordinary channel, in medians of the layer's channels."""
    ratio: float = 0.0
    """Share of the channels, rounded up, that are outliers whatever the threshold; 0 is none."""
    multiple: int = 1
    """Outliers are rounded up to a multiple of this, so that a kernel finds whole groups."""
    outlier: str = FLOAT
    """`weight` or `weight/activation` format of the outliers' linear."""
    gain: float = 0.1
    """Share by which a layer's error must fall; a negative one lets it rise."""

    def run(self, edit: Edit, facts: Facts) -> None:
        require(self.name, "threshold", self.threshold, self.threshold > 0, "above 0")
        require(self.name, "ratio", self.ratio, 0 <= self.ratio < 1, "from 0 to below 1")
        require(self.name, "multiple", self.multiple, self.multiple >= 1, "at least 1")
        require(self.name, "gain", self.gain, self.gain < 1, "below 1")
        better = _scheme(self.outlier)
        columns = Columns(edit)
        for layer in layers(edit, facts, self.name):
            outliers, rest = self._divide(facts, layer)
            if not len(outliers) or not len(rest):
                what = f"exceeds {self.threshold:g} × the median" if len(rest) else "would be left"
                edit.skip(layer.site.node, f"no input channel {what}")
                continue
            rows = layer.weight.shape[0]
            weights = layer.weight[:, rest], layer.weight[:, outliers]
            stored = better.weight
            error = layer.error(
                computed(layer.x[:, rest], weights[0], layer.scheme),
                computed(layer.x[:, outliers], weights[1], better),
            )
            size = layer.format.bytes((rows, len(rest))) + (
                stored.bytes((rows, len(outliers)))
                if stored
                else rows * len(outliers) * layer.dtype.itemsize
            )
            size += columns.bytes(layer, rest) + columns.bytes(layer, outliers)
            what = (
                f"split of {len(outliers)} outlier{'s' * (len(outliers) > 1)} into {self.outlier}"
            )
            if not accept(edit, layer, Split(what, error, size), self.gain):
                continue
            at, x = columns.of(layer, rest, "rest")
            first = main(edit, layer, x, _part(edit, layer, at))
            at, x = columns.of(layer, outliers, "outliers")
            second = edit.call(aten.linear.default, x, _part(edit, layer, at), like=layer.site.node)
            if better != Scheme():
                edit.assign(second, better)
            join(edit, layer, first, second)

    def _divide(self, facts: Facts, layer: Layer) -> tuple[Tensor, Tensor]:
        """(outliers, rest): numbers of channels in order."""
        seen = facts.activation(layer.site.id).absmax
        over = int((seen > self.threshold * seen.median()).sum())
        count = max(over, math.ceil(self.ratio * len(seen)))
        count = math.ceil(count / self.multiple) * self.multiple
        out = torch.zeros(len(seen), dtype=torch.bool)
        out[seen.topk(min(count, len(seen))).indices] = True
        return out.nonzero()[:, 0], (~out).nonzero()[:, 0]


def _part(edit: Edit, layer: Layer, at: fx.Node) -> fx.Node:
    """The weight's columns `at`."""
    return edit.call(aten.index_select.default, layer.site.weight, 1, at, like=layer.site.node)


def _scheme(text: str) -> Scheme:
    weight, mark, activation = text.partition("/")
    formats = [None if f == FLOAT else QFormat.parse(f) for f in (weight, activation or FLOAT)]
    if (formats[0] and formats[0].dynamic) or (mark and not activation):
        raise BadInput(
            "split_outliers: outlier is `float`, or a weight's format with or without "
            f"`/activation`; found {text!r}"
        )
    return Scheme(*formats)
